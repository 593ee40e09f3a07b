"""Weights & Biases: online where somebody is logged in, else in files that can be sent later."""

import netrc
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal

from ._base import AbstractTracker, Begun, Outcome, Table, TrackedRun, TrackerKind

_PATIENCE = 30.0  # seconds for a server to answer at the beginning


class WeightsAndBiases(AbstractTracker[Any]):
    """A run of Weights & Biases. The session is its `wandb.Run`.

    `WANDB_MODE`, `WANDB_ENTITY`, `WANDB_DIR` and wandb's other variables count. Where nobody is logged in, nobody is
    asked: the run is recorded offline, in `wandb/` of the run's folder. So it is where no server answers.
    """

    def begin(self, run: TrackedRun) -> Begun[Any]:
        from wandb.errors import CommError

        is_known = "WANDB_MODE" in os.environ or _is_logged_in()
        try:
            session = _init(run, None if is_known else "offline")
        except CommError:  # a machine without a network, say
            session = _init(run, "offline")
        # Steps of ours as the axis: wandb's own count takes no step a second time, which a resumed run may do again.
        session.define_metric("step")
        session.define_metric("*", step_metric="step")
        sync = f"offline; send it with: wandb sync {session.sync_dir}"
        return Begun(session, {"id": session.id}, sync if session.offline else session.url or "online")

    def step(self, session: Any, step: int, metrics: Mapping[str, float | int]) -> None:
        session.log({**metrics, "step": step})

    def completions(self, session: Any, step: int, table: Table) -> None:
        import wandb

        # Rewards may be numbers in one row and missing in another.
        rows = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows], allow_mixed_types=True)
        session.log({"completions": rows, "step": step})

    def summary(self, session: Any, values: Mapping[str, float | int]) -> None:
        session.summary.update(dict(values))

    def end(self, session: Any, outcome: Outcome) -> None:
        session.finish(exit_code=0 if outcome is Outcome.FINISHED else 1)


def _init(run: TrackedRun, mode: Literal["offline"] | None) -> Any:
    """The run of before, or a new one; without a mode, as wandb is set up."""
    import wandb

    known = run.kept.get("id")
    is_offline = "offline" in (mode, os.environ.get("WANDB_MODE"))
    settings: dict[str, Any] = {"console": "off", "silent": True}
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings["init_timeout"] = _PATIENCE
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT") or run.project,
        name=run.name,
        config=dict(run.config),
        dir=os.environ.get("WANDB_DIR") or str(run.folder),
        id=known,
        # Offline there is no run to be asked about: the same id is what joins the parts when they are sent.
        resume="allow" if known and not is_offline else None,
        allow_val_change=True,
        mode=mode,
        reinit="create_new",
        settings=settings,
    )


def _is_logged_in() -> bool:
    """Whether wandb would find a key without asking for one: in a variable, or where `wandb login` puts it."""
    import wandb

    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urllib.parse.urlsplit(wandb.setup().settings.base_url).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


TRACKER = TrackerKind(WeightsAndBiases(), modules=("wandb",), package="wandb")
