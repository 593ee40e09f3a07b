"""All trackers of a run as one: each is told everything, and none can stop the run."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import Stopped
from ...files import json_line
from .._folder import replace_file
from ._base import AbstractTracker, Outcome, TrackedRun
from ._kinds import TRACKER_KINDS
from ._table import completion_table

KEPT_FILE = "trackers.json"
_LONGEST = 300  # characters of what a tracker has said


class Trackers:
    """The trackers of a run, from [`begun_trackers`][]. Without any, nothing happens.

    What one of them raises is said once, and that one is off from then on: a run is worth more than its curves, and
    `metrics.jsonl` has them.

    **Arguments:**

    - `every`: every so many steps the trackers get a table of completions; 0 for never.
    - `warn`: is told what failed.
    """

    def __init__(self, every: int, warn: Callable[[str], None]):
        self._every, self._warn = every, warn
        self._open: dict[str, tuple[AbstractTracker[Any], Any]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are on."""
        return tuple(self._open)

    def begin(self, name: str, run: TrackedRun) -> tuple[dict[str, str], str] | None:
        """Begins one, unless it fails: what it wants to have kept, and where it is to be seen."""
        tracker = TRACKER_KINDS[name].tracker
        try:
            begun = tracker.begin(run)
        except Exception as error:
            self._off(name, error)
            return None
        self._open[name] = tracker, begun.session
        return begun.keep, begun.place

    def step(self, step: int, metrics: Mapping[str, Any], completions: Sequence[Mapping[str, Any]] = ()) -> None:
        """What a step leaves in the records.

        **Arguments:**

        - `step`: counted from 1.
        - `metrics`: by name; what is no finite number is left out. Without any, nothing is told: so an evaluation's
            metrics are, where one was due.
        - `completions`: records of `completions.jsonl`, of which a table goes out where one is due.
        """
        numbers = finite(metrics)
        if numbers:
            self._all(lambda tracker, session: tracker.step(session, step, numbers))
        if self._open and completions and self._every and step % self._every == 0:
            table = completion_table(completions)
            self._all(lambda tracker, session: tracker.completions(session, step, table))

    def summary(self, values: Mapping[str, Any]) -> None:
        """What the whole run came to."""
        numbers = finite(values)
        self._all(lambda tracker, session: tracker.summary(session, numbers))

    def end(self, outcome: Outcome) -> None:
        """Closes all that are on."""
        self._all(lambda tracker, session: tracker.end(session, outcome))
        self._open.clear()

    def _all(self, tell: Callable[[AbstractTracker[Any], Any], None]) -> None:
        for name, (tracker, session) in list(self._open.items()):
            try:
                tell(tracker, session)
            except Exception as error:
                del self._open[name]
                self._off(name, error)

    def _off(self, name: str, error: Exception) -> None:
        said = " ".join(str(error).split()) or type(error).__name__
        self._warn(
            f"the tracker {name} has failed and is off for the rest of this start; the run goes on, and metrics.jsonl "
            f"has everything: {said[:_LONGEST]}"
        )


@contextmanager
def begun_trackers(
    names: Sequence[str], run: TrackedRun, every: int, say: Callable[[str], None], warn: Callable[[str], None]
) -> Iterator[Trackers]:
    """The trackers of a run for the length of a `with` block. They are told how it ended.

    What they need to go on with later is in `trackers.json` of the run folder.

    **Arguments:**

    - `names`: of the trackers, which [`check_trackers`][] has looked for.
    - `run`: what they get to know; its `kept` is filled in here.
    - `every`: every so many steps they get a table of completions.
    - `say`: is told where the figures are to be seen.
    - `warn`: is told what failed.
    """
    trackers = Trackers(every, warn)
    kept = _read_kept(run.folder)
    for name in names:
        own = TrackedRun(run.name, run.project, run.folder, run.config, run.done, kept.get(name, {}))
        begun = trackers.begin(name, own)
        if begun is not None:
            kept[name], place = begun
            say(f"tracking  {name}: {place}")
    try:
        if trackers.names:
            replace_file(run.folder / KEPT_FILE, json.dumps(kept, indent=1).encode("utf-8", "replace"))
        yield trackers
    except Stopped:
        trackers.end(Outcome.STOPPED)
        raise
    except BaseException:
        trackers.end(Outcome.FAILED)
        raise
    trackers.end(Outcome.FINISHED)


def finite(values: Mapping[str, Any]) -> dict[str, float | int]:
    """Those that are finite numbers, as `metrics.jsonl` has them."""
    plain = json.loads(json_line(values))  # what is not finite is `None` there
    return {key: value for key, value in plain.items() if type(value) in (int, float)}


def _read_kept(folder: Path) -> dict[str, dict[str, str]]:
    """What is there; nothing where it is missing or damaged: then the trackers' runs are new ones."""
    try:
        kept = json.loads((folder / KEPT_FILE).read_bytes())
        return {name: {key: str(value) for key, value in own.items()} for name, own in kept.items()}
    except (OSError, ValueError, AttributeError):
        return {}
