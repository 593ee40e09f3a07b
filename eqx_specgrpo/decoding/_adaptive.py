"""The draft length that pays: measured costs, measured acceptance, and plain decoding always among the choices."""

import math
import statistics

import equinox as eqx

from ._length import LONGEST, AbstractLengthController, Expectation, SegmentObservation, SegmentPlan

_KEPT_TIMES = 5  # of each kind of segment; their median is its cost
_FORGET_AFTER = 3000.0  # rounds of a row after which an observation of acceptance has lost most of its weight
_SEGMENT_SECONDS = 0.25  # long enough for the host's share not to show
_PROBE_SECONDS = 0.06
_WORTH_TRYING = 1.03  # an untried length must promise this much more than the best one known
_BENEFIT_OF_DOUBT = 8.0  # tokens taken to be accepted at each position of an untried length: few were seen, perhaps
_NOT_HOPELESS = 0.7  # a known length is looked at again only if it is at least this good


class AdaptiveState(eqx.Module):
    """What an `AdaptiveLength` has learned.

    **Arguments:**

    - `lengths`: those to choose from, ascending; the first is 0.
    - `seconds`: of a round, by (rows, length): the newest measurements.
    - `measured_at`: when each kind was measured last, on the clock of `clock`.
    - `passed`, `reached`: for each draft position, how many tokens were accepted there and how many could have been,
        both with old rounds forgotten.
    - `clock`: seconds of decoding seen so far.
    - `lost`: of these, seconds that looking again at other lengths has cost.
    """

    lengths: tuple[int, ...]
    seconds: dict[tuple[int, int], tuple[float, ...]]
    measured_at: dict[tuple[int, int], float]
    passed: tuple[float, ...]
    reached: tuple[float, ...]
    clock: float
    lost: float


class AdaptiveLength(AbstractLengthController[AdaptiveState]):
    """Drafts as many tokens as gives most tokens a second, and none where speculation does not pay.

    A round with `rows` rows and draft length `k` costs `c(rows, k)` seconds, which is measured, and yields
    `E(k) = 1 + a_1 + a_1 a_2 + ...` tokens a row, where `a_i` is the running share of drafted tokens accepted at
    position `i` among those whose predecessors were. The length with the largest `E(k) / c(rows, k)` is used. Longer
    ones are tried once, one step at a time, if they could be better by what is known; lengths that were tried are
    looked at again now and then, so that a draft or a policy that has changed is noticed, but for no more than
    `exploration` of the time.

    Nothing here looks at a token, so every choice is lossless. With random numbers that depend on the rounds
    (`Rejection`, `Block`) the choices, and so the clock, decide *which* completions of the same distribution come out;
    under `Coupled` the completions are the same.

    **Arguments:**

    - `longest`: the most tokens to draft, or the draft's greatest length if that is smaller.
    - `exploration`: share of the decoding time that may be lost by looking again at other lengths.
    """

    longest: int = eqx.field(static=True, default=4)
    exploration: float = eqx.field(static=True, default=0.01)

    def __check_init__(self):
        if not 0 <= self.longest <= LONGEST:
            raise ValueError(f"longest is {self.longest}, but lengths are 0 to {LONGEST}")
        if not 0 <= self.exploration <= 1:
            raise ValueError(f"exploration is {self.exploration}, but it is a share of the time, from 0 to 1")

    def init(self, max_length: int) -> AdaptiveState:
        lengths = tuple(k for k in (0, 1, 2, 3, 4, 6, 8) if k <= min(self.longest, max_length))
        nothing = (0.0,) * lengths[-1]
        return AdaptiveState(lengths, {}, {}, nothing, nothing, 0.0, 0.0)

    def choose(self, state: AdaptiveState, rows: int) -> SegmentPlan:
        known = [k for k in state.lengths if (rows, k) in state.seconds]
        if 0 not in known:
            return _plan(state, rows, 0, _PROBE_SECONDS)
        best = max(known, key=lambda k: _speed(state, rows, k))
        untried = self._worth_trying(state, rows, known, best)
        if untried is not None:
            return _plan(state, rows, untried, _PROBE_SECONDS)
        if state.lost <= self.exploration * state.clock:
            again = [
                k for k in known if k != best and _speed(state, rows, k) > _NOT_HOPELESS * _speed(state, rows, best)
            ]
            if not again and best == 0 and len(state.lengths) > 1:
                again = [state.lengths[1]]  # hopeless by now, but the draft may have learned since
            if again:
                oldest = min(again, key=lambda k: state.measured_at.get((rows, k), 0.0))
                if state.clock - state.measured_at.get((rows, oldest), 0.0) > 8 * _SEGMENT_SECONDS:
                    return _plan(state, rows, oldest, _PROBE_SECONDS)
        return _plan(state, rows, best, _SEGMENT_SECONDS)

    def _worth_trying(self, state: AdaptiveState, rows: int, known: list[int], best: int) -> int | None:
        """The shortest untried length, if it promises more than the best one."""
        untried = [k for k in state.lengths if k > known[-1]]
        if not untried or best < known[-1] and len(known) > 2:
            return None  # beyond the best length it only gets worse
        promised = expected_tokens(state, untried[0], _BENEFIT_OF_DOUBT) / expected_seconds(state, rows, untried[0])
        return untried[0] if promised > _WORTH_TRYING * _speed(state, rows, best) else None

    def update(self, state: AdaptiveState, observation: SegmentObservation) -> AdaptiveState:
        rows, length = observation.rows, observation.plan.length
        passed, reached = list(state.passed), list(state.reached)
        could = float(observation.active_rounds)
        for position, accepted in enumerate(observation.accepted):
            keep = math.exp(-could / _FORGET_AFTER)
            passed[position] = keep * passed[position] + accepted
            reached[position] = keep * reached[position] + could
            could = float(accepted)
        seconds, measured_at, lost = dict(state.seconds), dict(state.measured_at), state.lost
        clock = state.clock
        if observation.seconds is not None and observation.rounds > 0:
            clock += observation.seconds
            times = (*seconds.get((rows, length), ()), observation.seconds / observation.rounds)
            was_known = len(times) > 1
            seconds[rows, length] = times[-_KEPT_TIMES:]
            measured_at[rows, length] = clock
            new = AdaptiveState(state.lengths, seconds, measured_at, tuple(passed), tuple(reached), clock, state.lost)
            if was_known:
                known = [k for k in state.lengths if (rows, k) in seconds]
                best = max(_speed(new, rows, k) for k in known)
                lost += observation.seconds * (1 - _speed(new, rows, length) / best)
        return AdaptiveState(state.lengths, seconds, measured_at, tuple(passed), tuple(reached), clock, lost)


def expected_tokens(state: AdaptiveState, length: int, benefit: float = 0.0) -> float:
    """Tokens a round of a row with this draft length, from acceptance so far; at positions never drafted, as at the one
    before. So many further tokens are taken to have been accepted at each position."""
    total, survival, rate = 1.0, 1.0, 1.0
    for passed, reached in zip(state.passed[:length], state.reached[:length], strict=True):
        rate = (passed + benefit) / (reached + benefit) if reached > 0 else rate
        survival *= rate
        total += survival
    return total


def expected_seconds(state: AdaptiveState, rows: int, length: int) -> float:
    """Seconds of a round: measured, or guessed low from what was measured with as many rows.

    A guess that is too low is put right by trying; one that is too high would never be.
    """
    if (rows, length) in state.seconds:
        return statistics.median(state.seconds[rows, length])
    known = [k for k in state.lengths if (rows, k) in state.seconds]
    # The same step was taken with another number of rows, perhaps: then by the ratio there.
    others = {r for r, k in state.seconds if k == length and (r, 0) in state.seconds}
    if others and 0 in known:
        nearest = min(others, key=lambda r: abs(math.log(r / rows)))
        ratio = statistics.median(state.seconds[nearest, length]) / statistics.median(state.seconds[nearest, 0])
        return ratio * statistics.median(state.seconds[rows, 0])
    return statistics.median(state.seconds[rows, known[-1]])


def _speed(state: AdaptiveState, rows: int, length: int) -> float:
    return expected_tokens(state, length) / expected_seconds(state, rows, length)


def _plan(state: AdaptiveState, rows: int, length: int, seconds: float) -> SegmentPlan:
    if not any(r == rows for r, _ in state.seconds):
        return SegmentPlan(length, max_rounds=8)
    expected = Expectation(expected_tokens(state, length), expected_seconds(state, rows, length))
    return SegmentPlan(length, max(4, min(256, round(seconds / expected.seconds_per_round))), expected)
