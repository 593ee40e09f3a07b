"""trackio: a local database that its own dashboard shows."""

import contextlib
import io
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from ._base import AbstractTracker, Begun, Outcome, Table, TrackedRun, TrackerKind


class Trackio(AbstractTracker[Any]):
    """A run of trackio, in `TRACKIO_DIR` or where trackio keeps them. The session is its `trackio.Run`.

    Local, unless `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` name a place.
    """

    def begin(self, run: TrackedRun) -> Begun[Any]:
        import trackio

        known = run.kept.get("name")
        # trackio finds a run to go on with by its name: among several `default`, the right one has to have its own.
        name = known or f"{run.name}-{secrets.token_hex(3)}"
        with _quietly():
            session = trackio.init(
                project=run.kept.get("project", run.project),
                name=name,
                config=dict(run.config),
                resume="allow" if known else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        keep = {"project": session.project, "name": session.name}
        return Begun(session, keep, f"trackio show --project {session.project}, run {session.name}")

    def step(self, session: Any, step: int, metrics: Mapping[str, float | int]) -> None:
        # `step` is trackio's own word for where a value stands.
        session.log({name: value for name, value in metrics.items() if name != "step"}, step=step)

    def completions(self, session: Any, step: int, table: Table) -> None:
        import trackio

        rows = trackio.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        session.log({"completions": rows}, step=step)

    def summary(self, session: Any, values: Mapping[str, float | int]) -> None:
        session.log(dict(values))

    def end(self, session: Any, outcome: Outcome) -> None:
        import trackio

        del session, outcome
        with _quietly():
            trackio.finish()  # the session's: trackio has one at a time. Finished by itself, it would be again at exit.


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """trackio tells on standard output what we tell in our own words."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


TRACKER = TrackerKind(Trackio(), modules=("trackio",), package="trackio")
