"""How many tokens to draft. A matter of speed only: a controller sees counts and times, never a sampled token.

That is what keeps every length lossless: whether a position is drafted must not depend on the token drawn there.
"""

from abc import abstractmethod
from typing import Generic, TypeVar

import equinox as eqx

State = TypeVar("State")


class SegmentObservation(eqx.Module):
    """What the host saw of one decoding segment.

    **Arguments:**

    - `rows`: rows of the compiled program, finished ones included.
    - `length`: tokens drafted a round.
    - `rounds`: rounds run.
    - `seconds`: wall-clock time; compilation is not part of it.
    - `accepted`: for each draft position, accepted tokens summed over rows and rounds.
    - `active_rounds`: rounds summed over the rows that were still active in them.
    """

    rows: int
    length: int
    rounds: int
    seconds: float
    accepted: tuple[int, ...]
    active_rounds: int


class AbstractLengthController(eqx.Module, Generic[State]):
    """Chooses the draft length of each segment, on the host."""

    @abstractmethod
    def init(self, max_length: int) -> State:
        """The state before the first segment; `max_length` is the draft's. Raises if they do not fit."""

    @abstractmethod
    def choose(self, state: State, rows: int) -> int:
        """The length for the next segment with so many rows; 0 is plain decoding."""

    @abstractmethod
    def update(self, state: State, observation: SegmentObservation) -> State:
        """Learns from a segment."""


class FixedLength(AbstractLengthController[int]):
    """Always the same length, or the draft's greatest if that is smaller.

    **Arguments:**

    - `length`: tokens to draft a round, 0 to 8.
    """

    length: int = eqx.field(static=True)

    def __check_init__(self):
        if not 0 <= self.length <= 8:
            raise ValueError(
                f"a draft length of {self.length} was asked for, but lengths are 0 to 8: longer chains lose more in "
                "verification than they gain"
            )

    def init(self, max_length: int) -> int:
        return min(self.length, max_length)

    def choose(self, state: int, rows: int) -> int:
        del rows
        return state

    def update(self, state: int, observation: SegmentObservation) -> int:
        del observation
        return state
