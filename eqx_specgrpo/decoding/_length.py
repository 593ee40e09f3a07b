"""How many tokens to draft. A matter of speed only: a controller sees counts and times of what is done, and means over
it, never a sampled token.

That is what keeps every length lossless: whether a position is drafted must not depend on the token drawn there.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import equinox as eqx

State = TypeVar("State")

LONGEST = 8


class Expectation(eqx.Module):
    """The speed that a length controller expects of a segment.

    **Arguments:**

    - `tokens_per_round`: acceptance length.
    - `seconds_per_round`: wall-clock time of a round.
    """

    tokens_per_round: float
    seconds_per_round: float


class SegmentPlan(eqx.Module):
    """A plan for the next segment of rounds.

    **Arguments:**

    - `length`: tokens drafted per round; 0 is plain decoding.
    - `max_rounds`: the segment ends after so many rounds, or earlier when rows can be shrunk away or refilled. (A
        [`eqx_specgrpo.decoding.FixedRounds`][] loop always runs its own number.)
    - `expected`: the expected speed, or `None`.
    - `otherwise`: the plan to follow where the program of this one would have to be compiled, if it is known to be
        missing: this one is only to measure its length again. `None`: it is worth compiling.
    """

    length: int
    max_rounds: int
    expected: Expectation | None = None
    otherwise: "SegmentPlan | None" = None


class SegmentObservation(eqx.Module):
    """Counts and times of one decoding segment, as the host saw it.

    **Arguments:**

    - `rows`: rows of the compiled program, finished ones included; on a mesh those of one shard, all of which have as
        many.
    - `plan`: the plan that it followed.
    - `rounds`: rounds run.
    - `seconds`: wall-clock time, or `None` if it says nothing of the rounds: a program was compiled within it, or in
        another thread beside it.
    - `compile_seconds`: of compilation within it, which was waited for.
    - `behind_seconds`: that its program took to compile while others ran.
    - `elapsed`: wall-clock time in any case.
    - `accepted`: for each draft position, accepted tokens summed over rows and rounds.
    - `active_rounds`: rounds summed over the rows that were still active in them.
    - `tokens`: tokens emitted, over all rows.
    - `context`: tokens that the longest row had emitted, on average over the segment.
    """

    rows: int
    plan: SegmentPlan
    rounds: int
    seconds: float | None
    accepted: tuple[int, ...]
    active_rounds: int
    tokens: int
    compile_seconds: float = 0.0
    behind_seconds: float = 0.0
    elapsed: float = 0.0
    context: float = 0.0


class AbstractLengthController(eqx.Module, Generic[State]):
    """A length controller, which chooses the draft length of each segment, on the host. What it learns is a separate
    state, which may be carried from one call of `decode` to the next."""

    @abstractmethod
    def init(self, max_length: int) -> State:
        """Returns the state before the first segment. `max_length` is the draft's, and no plan may be longer."""

    @abstractmethod
    def choose(self, state: State, rows: int, context: int) -> SegmentPlan:
        """Chooses the plan for the next segment, with this number of rows, the longest of which has emitted `context`
        tokens."""

    @abstractmethod
    def update(self, state: State, observation: SegmentObservation) -> State:
        """Returns the state after a segment."""

    @abstractmethod
    def after_training(self, state: State, expected_acceptance: Sequence[float] | None) -> State:
        """Returns the state after an update of the target or of the draft.

        **Arguments:**

        - `expected_acceptance`: of each draft position, as the draft's first lesson since the last update found it on
            completions that were decoded since then, by the weights that decoded them (`sum(min(target, draft))` over
            the vocabulary, on average); `None` if there was none.
        """

    @abstractmethod
    def with_future(self, state: State, left: float) -> State:
        """Returns the state of a controller that knows how much there will be to decode: `left` times what it has seen
        so far. A length is worth compiling sooner where it will be used for long."""

    @abstractmethod
    def round_seconds(self, state: State, rows: int, length: int, context: float) -> float | None:
        """What a round of so many rows and this draft length takes where the longest row has emitted `context` tokens,
        as far as the controller knows: from what it has seen of such rounds, or of others like them. `None` if it knows
        of none."""

    @abstractmethod
    def metrics(self, state: State) -> dict[str, float]:
        """Figures on what it has learned, by name, for a run's records."""


class FixedLength(AbstractLengthController[int]):
    """A length controller that always drafts the same number of tokens, or the draft's most if that is smaller.

    **Arguments:**

    - `length`: tokens to draft per round, 0 to 8.
    """

    length: int = eqx.field(static=True)

    def __check_init__(self):
        if not 0 <= self.length <= LONGEST:
            raise ValueError(
                f"a draft length of {self.length} was asked for, but lengths are 0 to {LONGEST}: longer chains lose "
                "more in verification than they gain"
            )

    def init(self, max_length: int) -> int:
        return min(self.length, max_length)

    def choose(self, state: int, rows: int, context: int) -> SegmentPlan:
        del rows, context
        return SegmentPlan(state, max_rounds=64)

    def update(self, state: int, observation: SegmentObservation) -> int:
        del observation
        return state

    def after_training(self, state: int, expected_acceptance: Sequence[float] | None) -> int:
        del expected_acceptance
        return state

    def with_future(self, state: int, left: float) -> int:
        del left
        return state

    def round_seconds(self, state: int, rows: int, length: int, context: float) -> float | None:
        del state, rows, length, context
        return None

    def metrics(self, state: int) -> dict[str, float]:
        del state
        return {}
