"""Where a run's wall-clock time goes, by phase."""

from collections.abc import Mapping

# The phases of a step, in order.
STEP_PHASES = ("rollout", "reward", "update", "draft")


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

    def add(self, phase: str, seconds: float, compiling: float) -> None:
        """A phase is over, not for the first time perhaps."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.compiling[phase] = self.compiling.get(phase, 0.0) + compiling
        self._laps[phase] = self._laps.get(phase, 0.0) + seconds

    def laps(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        laps, self._laps = self._laps, {}
        return laps


def step_times(laps: Mapping[str, float]) -> dict[str, float]:
    """`time/*` of a step's metrics, in seconds: its phases, one that it has not being 0, and their sum."""
    times = {f"time/{phase}": laps.get(phase, 0.0) for phase in STEP_PHASES}
    return times | {"time/step": sum(times.values())}
