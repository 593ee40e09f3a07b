"""Where a run's wall-clock time goes, by phase."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

# The phases of a step, in order.
STEP_PHASES = ("rollout", "reward", "update", "draft")
OTHER = "other"  # what no phase accounts for


class PhaseTimes:
    """Adds up seconds by phase, and how much of them went into compiling.

    **Attributes:**

    - `seconds`: wall-clock time of each phase, in the order in which the phases came.
    - `compiling`: how much of it was compiling.
    """

    seconds: dict[str, float]
    compiling: dict[str, float]

    def __init__(self):
        self.seconds, self.compiling = {}, {}
        self._laps: dict[str, float] = {}
        self._begin = time.perf_counter()

    def add(self, phase: str, seconds: float, compiling: float) -> None:
        """A phase is over, not for the first time perhaps."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.compiling[phase] = self.compiling.get(phase, 0.0) + compiling
        self._laps[phase] = self._laps.get(phase, 0.0) + seconds

    def laps(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        laps, self._laps = self._laps, {}
        return laps

    def record(self, from_step: int) -> dict[str, Any]:
        """All of it since this object was made, as an object of `times.jsonl`; the phases add up to `total`.

        **Arguments:**

        - `from_step`: the first step of this start.
        """
        total = time.perf_counter() - self._begin
        seconds = self.seconds | {OTHER: max(0.0, total - sum(self.seconds.values()))}
        return {"from_step": from_step, "total": total, "seconds": seconds, "compiling": dict(self.compiling)}


def step_times(laps: Mapping[str, float]) -> dict[str, float]:
    """`time/*` of a step's metrics, in seconds: its phases, one that it has not being 0, and their sum."""
    times = {f"time/{phase}": laps.get(phase, 0.0) for phase in STEP_PHASES}
    return times | {"time/step": sum(times.values())}


def seconds_by_phase(starts: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Over all starts of a run: the seconds of each phase, and how many of them were compiling.

    **Arguments:**

    - `starts`: objects of `times.jsonl`.
    """
    sums: dict[str, tuple[float, float]] = {}
    for start in starts:
        for phase, seconds in start["seconds"].items():
            before = sums.get(phase, (0.0, 0.0))
            sums[phase] = (before[0] + seconds, before[1] + start["compiling"].get(phase, 0.0))
    other = sums.pop(OTHER, None)  # last, also where a later start has a phase of its own
    return sums if other is None else sums | {OTHER: other}
