"""The draft length that pays: measured costs, measured acceptance, and plain decoding always among the choices."""

import dataclasses
import math
from collections.abc import Sequence

import equinox as eqx

from ._adaptive_state import (
    COMPILE_GUESS,
    ENOUGH_LOOKS,
    AdaptiveState,
    expected_seconds,
    expected_speed,
    expected_tokens,
    guessed_seconds,
    initial_state,
    known_lengths,
    with_lesson,
    with_observation,
)
from ._length import LONGEST, AbstractLengthController, Expectation, SegmentObservation, SegmentPlan

# A segment is this share of all the time seen so far, within these limits: the choice is looked at often at first, and
# later the host's share of a segment, several milliseconds, does not show.
_SEGMENT_SHARE = 0.05
_SHORTEST_SEGMENT, _LONGEST_SEGMENT = 0.5, 1.5  # seconds
_PROBE_SECONDS = 0.1
_LEAST_ROUNDS = 2  # no more than have to be: rounds of another length are what makes rows uneven
_AGAIN_AFTER = 2.0
# Compilations whose time may pass without a look at plain decoding. Longer contexts, for which its program is not
# there, make some lengths dearer than others, and nothing else would tell that drafting has stopped to pay.
_PLAIN_AFTER = 20.0
_BENEFIT_OF_DOUBT = 8.0  # tokens taken to be accepted at each position of an untried length: few were seen, perhaps
# Rows that draft get on unevenly, and the last of them are decoded in a small batch; in plain decoding all reach the
# limit at once. What a round yields in its time does not show that: a round has to be so much faster for the whole to
# come out even.
_UNEVEN_ENDS = 1.05
_UNEVEN_LOOK = 0.35  # of the time of a look at drafting while plain decoding is best, at most: lost at the ends of rows
_PATIENCE = 10.0  # how many times its compilation a length must be worth that pays only at the cost hoped for
_FORESIGHT = 4.0  # times what was decoded so far, that decodings to come count for when a compilation has to pay
_CLEARLY = 1.03  # a shorter length is preferred, plain decoding above all, unless it is so much slower


class AdaptiveLength(AbstractLengthController[AdaptiveState]):
    """Chooses the draft length with the highest expected throughput; 0 where speculation does not pay.

    **The choice.** A round with `rows` rows and draft length `k` takes `c(rows, k)` seconds. It yields `E(k) = 1 + a_1
    + a_1 a_2 + ...` tokens per row, where `a_i` is the acceptance rate at draft position `i`, given that all earlier
    positions were accepted. Costs and acceptance rates are running means. Both are kept for each number of rows,
    because the rows that are left at the end are often the hardest to draft for. The controller takes the shortest
    length whose `E(k) / c(rows, k)` is within a few per cent of the highest. With several rows, drafting must also make
    up for rows that finish at different times.

    **Lengths that were never run.** Their cost is predicted from the number of positions in a pass, `rows * (k + 1)`,
    by the measured costs of other batches. A length is compiled once the time that it would have saved exceeds the time
    of a compilation. A length that cannot pay is never compiled.

    **Lengths that were run before** are measured again from time to time, the better ones more often, so that changes
    of the draft or the policy are noticed. This takes at most the share `exploration` of the decoding time. (Where
    plain decoding is best, that share is an estimate: each measurement makes rows finish at different times.)

    **Training between decodings.** `after_training` says what the draft's lessons found accepted in the completions
    that were just decoded. The measured rates are corrected by how that changes from one time to the next, so that a
    draft is used again as soon as it is good enough.

    **Contexts.** A round becomes longer by the same time for each token of context, whatever is drafted: all positions
    of a row read the same keys and values. So guesses that do not pay at the beginning of a completion may pay later.
    The time a token is found by regression over the segments of each decoding.

    **Drift.** Rounds of all lengths become slower when the machine is busy. This common factor is tracked separately,
    so that two lengths measured at different times remain comparable.

    Choices do not depend on tokens, so decoding stays lossless. With `Rejection` and `Block` the random numbers depend
    on the rounds: the clock then decides *which* completions of the same distribution are drawn. With `Coupled` the
    completions do not depend on the choices.

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
        longest = min(self.longest, max_length)
        return initial_state((*(k for k in (0, 1, 2, 3, 4, 6, 8) if k < longest), longest))

    def choose(self, state: AdaptiveState, rows: int, context: int) -> SegmentPlan:
        if not isinstance(state, AdaptiveState) or state.lengths[-1] > self.longest:
            raise ValueError(
                f"the length_state is not one of AdaptiveLength({self.longest}): leave it out, or give what on_segment "
                "was given for this draft and this controller"
            )
        state = dataclasses.replace(state, context=float(context))
        known = known_lengths(state, rows)
        compiled = [k for k in state.lengths if (rows, k) in state.seen and k not in known]
        if not known:
            return SegmentPlan(compiled[0] if compiled else _as_with_most_alike(state, rows), max_rounds=8)
        plan = self._choose_by_costs(state, rows, known)
        return SegmentPlan(compiled[0], max_rounds=8, otherwise=plan) if compiled else plan

    def _choose_by_costs(self, state: AdaptiveState, rows: int, known: list[int]) -> SegmentPlan:
        best = _best(state, rows, known)
        seconds = min(max(_SHORTEST_SEGMENT, _SEGMENT_SHARE * state.clock), _LONGEST_SEGMENT)
        usual = _plan(state, rows, best, seconds)
        untried = self._worth_trying(state, rows, known, best)
        if untried is not None:
            return _plan(state, rows, untried, _PROBE_SECONDS)
        looks = self._worth_a_look(state, rows, known, best)
        overdue = _PLAIN_AFTER * (state.compile_seconds or COMPILE_GUESS)
        if 0 in looks and state.clock - state.costs[rows, 0].looked_at > overdue:
            return _plan(state, rows, 0, _PROBE_SECONDS)
        # Of these, the first whose program is there: one that is not must not keep the others from being looked at.
        plan = usual
        for length in reversed(looks):
            plan = dataclasses.replace(_plan(state, rows, length, _PROBE_SECONDS), otherwise=plan)
        return plan

    def _worth_trying(self, state: AdaptiveState, rows: int, known: list[int], best: int) -> int | None:
        """A length that was never run, if the time it would have saved by now exceeds that of its compilation.

        So trying lengths costs at most as much as not trying them did, and nothing is compiled for a few rounds at the
        end of a batch. If further decodings are known to follow, their savings count too, up to four times what was
        decoded so far. The predicted cost may be too high: a length that would pay at its lowest plausible cost is
        tried as well, once it would have saved ten compilations.
        """
        candidates = [k for k in state.lengths if k not in known]
        if len({r * (k + 1) for r, k in state.costs}) == 1:
            candidates = candidates[:1]  # nothing tells yet how a round's cost grows: one step at a time
        costs = COMPILE_GUESS if state.compile_seconds is None else state.compile_seconds
        costs /= min(max(state.left, 1.0), _FORESIGHT)
        if not candidates or state.spent[rows] < costs:
            return None
        speed = _speed(state, rows, best)
        tokens = {k: expected_tokens(state, rows, k, _BENEFIT_OF_DOUBT if k > best else 0.0) for k in candidates}
        seconds = guessed_seconds(state, rows, candidates)
        for which, patience in ((0, 1.0), (1, _PATIENCE)):
            promises = {k: tokens[k] / seconds[k][which] / _ends(rows, k) for k in candidates}
            length = next(k for k in candidates if _CLEARLY * promises[k] >= max(promises.values()))
            worth = 1 - speed / promises[length]
            if worth > 1 - 1 / _CLEARLY and worth * state.spent[rows] >= patience * costs:
                return length
        return None

    def _worth_a_look(self, state: AdaptiveState, rows: int, known: list[int], best: int) -> list[int]:
        """Lengths that are hardly known, and those that were not looked at for long, the longest first, of those that
        may be.

        Each has the same share of the time that may be lost, so that a close rival, where a mistake would stay and a
        look costs next to nothing, is looked at often, and one far behind seldom, but never not at all: what was
        measured may have been wrong, and the draft may have learned since.
        """
        others = [k for k in known if k != best]
        hardly = [k for k in others if state.costs[rows, k].looks < ENOUGH_LOOKS]
        shares = max(1, len(state.lengths) - 1)
        if others and best == 0 and rows > 1:
            # Any look makes rows uneven, so the length that comes closest stands for all.
            others, shares = [max(others, key=lambda k: _speed(state, rows, k))], 1
        may_be_lost = self.exploration * state.clock / shares
        ages = {k: state.clock - state.costs[rows, k].looked_at for k in others if state.lost[k] < may_be_lost}
        due = [k for k in ages if ages[k] > _AGAIN_AFTER and k not in hardly]
        return [*hardly, *sorted(due, key=lambda k: -ages[k])]

    def update(self, state: AdaptiveState, observation: SegmentObservation) -> AdaptiveState:
        rows, length, seconds = observation.rows, observation.plan.length, observation.seconds
        was_known = (rows, length) in state.costs
        state = with_observation(state, observation)
        known = known_lengths(state, rows)
        if not known:
            return state
        best = _best(state, rows, known)
        if all(state.costs[rows, k].looks >= ENOUGH_LOOKS for k in known):
            state = dataclasses.replace(state, paid=state.paid | {(rows, best)})
        if not was_known or seconds is None or length == best:
            return state
        behind = max(0.0, 1 - _speed(state, rows, length) / _speed(state, rows, best))
        if best == 0 and rows > 1:
            behind = max(behind, _UNEVEN_LOOK)
        return dataclasses.replace(state, lost=state.lost | {length: state.lost[length] + behind * seconds})

    def after_training(self, state: AdaptiveState, expected_acceptance: Sequence[float] | None) -> AdaptiveState:
        return with_lesson(state, expected_acceptance)

    def with_future(self, state: AdaptiveState, left: float) -> AdaptiveState:
        return dataclasses.replace(state, left=left)

    def round_seconds(self, state: AdaptiveState, rows: int, length: int, context: float) -> float | None:
        state = dataclasses.replace(state, context=context)
        return expected_seconds(state, rows, length) if state.costs else None

    def metrics(self, state: AdaptiveState) -> dict[str, float]:
        """`spec/lengths_tried`: lengths above 0 that were run, each number of rows for itself; `spec/lengths_unpaid`:
        of these, such as were never the best choice."""
        tried = {kind for kind in state.seen if kind[1] > 0}
        unpaid = {kind for kind in tried - state.paid if kind in state.costs}
        return {"spec/lengths_tried": float(len(tried)), "spec/lengths_unpaid": float(len(unpaid))}


def _speed(state: AdaptiveState, rows: int, length: int) -> float:
    """Tokens a second of a row, less what uneven ends cost."""
    return expected_speed(state, rows, length) / _ends(rows, length)


def _ends(rows: int, length: int) -> float:
    """What uneven ends cost: nothing where there is one row, or none drafts."""
    return 1.0 if length == 0 or rows == 1 else _UNEVEN_ENDS


def _as_with_most_alike(state: AdaptiveState, rows: int) -> int:
    """For a new number of rows: what is best with the one most like it, and plain decoding at the very first."""
    seen = [r for r in state.spent if known_lengths(state, r)]
    if not seen:
        return 0
    nearest = min(seen, key=lambda r: abs(math.log(r / rows)))
    return _best(state, nearest, known_lengths(state, nearest))


def _best(state: AdaptiveState, rows: int, known: list[int]) -> int:
    """The shortest length that is about as fast as any."""
    speeds = {k: _speed(state, rows, k) for k in known}
    return next(k for k in known if _CLEARLY * speeds[k] >= max(speeds.values()))


def _plan(state: AdaptiveState, rows: int, length: int, seconds: float) -> SegmentPlan:
    expected = Expectation(expected_tokens(state, rows, length), expected_seconds(state, rows, length))
    return SegmentPlan(length, max(_LEAST_ROUNDS, min(256, round(seconds / expected.seconds_per_round))), expected)
