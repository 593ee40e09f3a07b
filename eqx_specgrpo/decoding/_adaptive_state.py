"""What an adaptive draft length knows: the cost of rounds, acceptance by position, and what follows from them."""

import dataclasses
import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import equinox as eqx

from ._context_costs import Moments, slope_of
from ._length import SegmentObservation
from ._round_costs import guessed_log_seconds

_FORGET_AFTER = 3000.0  # rounds of a row after which an observation of acceptance has lost most of its weight
_UNSEEN_ACCEPTANCE = 0.7  # at the first position, before anything was drafted and where no lesson says more
# Rounds of a row that acceptance seen with other weights counts for, at most: some segments outweigh it.
_OTHER_WEIGHTS = 500.0
_NEWEST_LESSON = 0.5  # its part in the running mean: a lesson has few prompts
_LIKELIEST = 0.98  # shares are kept between this and 1 minus this where odds are taken, to be finite
_OTHER_ROWS = 20.0  # rounds of a row that acceptance with any number of rows counts for, beside that with as many
_FOLLOW = 0.3  # how much of a surprise is put down to the machine, whatever it runs,
_LEARN = 0.1  # and how much, at least, to the kind of round
_LARGEST_SURPRISE = 0.5  # as a logarithm: a pause of the machine is not followed further
_LEAST_SHARE = 0.2  # of a round's time, that it takes with no context, whatever the slope says
ENOUGH_LOOKS = 3  # before a cost is relied on: any one may have met a pause of the machine, so their median counts
COMPILE_GUESS = 2.0  # seconds, while no compilation was seen


class RoundCost(eqx.Module):
    """What a round costs.

    **Arguments:**

    - `log_seconds`: on a machine that is as fast as it was when the first round was seen.
    - `context`: at which it takes so long.
    - `looks`: how often it was measured.
    - `looked_at`: when last, by the state's clock.
    - `first_looks`, `first_contexts`: what the first of them saw, whose medians `log_seconds` and `context` begin with.
    - `moments`: of contexts and seconds as they were measured.
    """

    log_seconds: float
    context: float
    looks: int
    looked_at: float
    first_looks: tuple[float, ...]
    first_contexts: tuple[float, ...]
    moments: Moments


class Counts(NamedTuple):
    """Drafted tokens by draft position: how many were accepted, of how many that followed accepted ones only."""

    passed: tuple[float, ...]
    reached: tuple[float, ...]

    @staticmethod
    def none(longest: int) -> "Counts":
        return Counts((0.0,) * longest, (0.0,) * longest)

    def plus(self, other: "Counts") -> "Counts":
        return Counts(
            tuple(map(operator.add, self.passed, other.passed)), tuple(map(operator.add, self.reached, other.reached))
        )

    def scaled(self, factor: float) -> "Counts":
        return Counts(tuple(factor * x for x in self.passed), tuple(factor * x for x in self.reached))

    def forgotten(self, observation: SegmentObservation) -> "Counts":
        """As they count beside a newer segment: at each position by how many tokens it had there."""
        passed, reached, could = list(self.passed), list(self.reached), float(observation.active_rounds)
        for position, accepted in enumerate(observation.accepted):
            keep = math.exp(-could / _FORGET_AFTER)
            passed[position], reached[position] = keep * passed[position], keep * reached[position]
            could = float(accepted)
        return Counts(tuple(passed), tuple(reached))

    def moved(self, before: Sequence[float] | None, after: Sequence[float] | None) -> "Counts":
        """With the odds of being accepted moved as from one acceptance by position to another; `None`: not moved."""
        if before is None or after is None:
            return self
        shifts = [_log_odds(b) - _log_odds(a) for a, b in zip(before, after, strict=True)]
        shifts += [0.0] * (len(self.passed) - len(shifts))
        return Counts(tuple(map(_moved, self.passed, self.reached, shifts)), self.reached)


class AdaptiveState(eqx.Module):
    """What an `AdaptiveLength` has learned.

    **Arguments:**

    - `lengths`: those to choose from, ascending; the first is 0.
    - `costs`: of a round, by (rows, length).
    - `slowness`: the logarithm of how much slower the machine is now than it was at first.
    - `context_seconds`: what each token of a row's context adds to a round, at the pace of the costs. It follows from
        `costs`, and is kept because each guess asks for it.
    - `context`: tokens that the longest row has emitted.
    - `decoding`: which one this is, counted by contexts that become shorter. (After one of a few tokens the next may
        count as the same.)
    - `accepted`: by number of rows, how many tokens were accepted at each draft position and how many could have been,
        with old rounds forgotten. Under 0, with any number of rows. What was seen before the last lesson is moved to
        the `expected` acceptance.
    - `since`: the same, of the rounds since the last lesson, as they were seen.
    - `expected`: acceptance by position as the draft's lessons find it, a running mean; `None` before the first.
    - `clock`: seconds of decoding seen so far.
    - `spent`: of these, by number of rows.
    - `lost`: of these, what looking again has cost, by length.
    - `seen`: kinds of segments, (rows, length), that were run.
    - `paid`: of these, what was the best choice at some time.
    - `compile_seconds`: what a new kind costs to compile: the most that was seen, or less where kinds that were new
        had been compiled already; `None` before the first segment.
    - `left`: decodings that are still to come, as a multiple of those that were; 0 where that is not known.
    """

    lengths: tuple[int, ...]
    costs: dict[tuple[int, int], RoundCost]
    slowness: float
    context_seconds: float
    context: float
    decoding: int
    accepted: dict[int, Counts]
    since: dict[int, Counts]
    expected: tuple[float, ...] | None
    clock: float
    spent: dict[int, float]
    lost: dict[int, float]
    seen: frozenset[tuple[int, int]]
    paid: frozenset[tuple[int, int]]
    compile_seconds: float | None
    left: float = 0.0


def initial_state(lengths: tuple[int, ...]) -> AdaptiveState:
    return AdaptiveState(
        lengths=lengths,
        costs={},
        slowness=0.0,
        context_seconds=0.0,
        context=0.0,
        decoding=0,
        accepted={0: Counts.none(lengths[-1])},
        since={},
        expected=None,
        clock=0.0,
        spent={},
        lost=dict.fromkeys(lengths, 0.0),
        seen=frozenset(),
        paid=frozenset(),
        compile_seconds=None,
    )


def with_observation(state: AdaptiveState, observation: SegmentObservation) -> AdaptiveState:
    """With a segment's acceptance and time taken in."""
    rows, seconds = observation.rows, observation.seconds
    new, accepted, since = _counts(observation, state.lengths[-1]), dict(state.accepted), dict(state.since)
    for which in (0, rows):
        if which in accepted:
            accepted[which] = accepted[which].forgotten(observation)
        since[which] = since[which].forgotten(observation).plus(new) if which in since else new
    state = dataclasses.replace(
        state,
        context=observation.context,
        decoding=state.decoding + (1 if observation.context < state.context else 0),
        accepted=accepted,
        since=since,
        spent={rows: 0.0} | state.spent,
    )
    kind = (rows, observation.plan.length)
    compile_seconds, compiling = state.compile_seconds, observation.compile_seconds + observation.behind_seconds
    if compiling > 0 or seconds is None:
        compile_seconds = max(compile_seconds or 0.0, compiling)
    elif kind not in state.seen:
        compile_seconds = (COMPILE_GUESS if compile_seconds is None else compile_seconds) / 2
    state = dataclasses.replace(state, seen=state.seen | {kind}, compile_seconds=compile_seconds)
    if seconds is None or observation.rounds == 0:
        return state
    state = dataclasses.replace(
        state, clock=state.clock + seconds, spent=state.spent | {rows: state.spent[rows] + seconds}
    )
    return _timed(state, rows, observation.plan.length, math.log(seconds / observation.rounds))


def _timed(state: AdaptiveState, rows: int, length: int, log_seconds: float) -> AdaptiveState:
    """With the time of a round taken in: partly as the machine's pace, partly as what such rounds cost."""
    old, slowness = state.costs.get((rows, length)), state.slowness
    if old is None or old.looks < ENOUGH_LOOKS:
        looks = (*(() if old is None else old.first_looks), log_seconds - slowness)
        contexts = (*(() if old is None else old.first_contexts), state.context)
        moments = (Moments() if old is None else old.moments).plus(state.context, math.exp(log_seconds), state.decoding)
        cost = RoundCost(
            statistics.median(looks), statistics.median(contexts), len(looks), state.clock, looks, contexts, moments
        )
    else:
        expected = _log_cost(state, rows, length) + slowness
        surprise = max(-_LARGEST_SURPRISE, min(_LARGEST_SURPRISE, log_seconds - expected))
        share = max(_LEARN, 1 / (old.looks + 1))
        # Value and place move by the same share, along the slope: a mean of the seconds, at the mean of the contexts.
        context = old.context + share * (state.context - old.context)
        moved = _log_cost(dataclasses.replace(state, context=context), rows, length)
        cost = dataclasses.replace(
            old,
            log_seconds=moved + share * surprise,
            context=context,
            looks=old.looks + 1,
            looked_at=state.clock,
            moments=old.moments.plus(state.context, math.exp(expected + surprise), state.decoding),
        )
        slowness += _FOLLOW * surprise
    costs = state.costs | {(rows, length): cost}
    return dataclasses.replace(state, costs=costs, slowness=slowness, context_seconds=_context_seconds(costs))


def _counts(observation: SegmentObservation, longest: int) -> Counts:
    """A segment's."""
    passed = tuple(map(float, observation.accepted))
    reached = (float(observation.active_rounds), *passed)[: len(passed)]
    rest = (0.0,) * (longest - len(passed))
    return Counts(passed + rest, reached + rest)


def with_lesson(state: AdaptiveState, acceptance: Sequence[float] | None) -> AdaptiveState:
    """After an update of the target or the draft: what was seen before counts for less, and is moved by as much as the
    acceptance that the draft's lessons find has moved.

    A lesson is on completions that were decoded since the last one, and finds what the draft is worth that drafted for
    them. So what was seen since then belongs to what this lesson found, and what was seen earlier to the mean of
    earlier lessons; both are moved to the mean with this one. The odds of being accepted are moved in proportion: where
    lessons are always off by about as much (a verifier that keeps less than `sum(min(p, q))`, rows that are harder to
    draft for), what was seen stays right. Without lessons, a draft that was hardly used while it learned would be
    judged by what it was.
    """
    old, found = state.expected, None
    if acceptance is not None:
        found = tuple(min(max(float(a), 1 - _LIKELIEST), _LIKELIEST) for a in acceptance)
    new = found if old is None else old
    if old is not None and found is not None:
        new = tuple(a + _NEWEST_LESSON * (b - a) for a, b in zip(old, found, strict=True))
    accepted = {}
    for which in state.accepted.keys() | state.since.keys():
        nothing = Counts.none(state.lengths[-1])
        earlier, since = state.accepted.get(which, nothing), state.since.get(which, nothing)
        counts = earlier.moved(old, new).plus(since.moved(found, new))
        accepted[which] = counts.scaled(_OTHER_WEIGHTS / max((_OTHER_WEIGHTS, *counts.reached)))
    return dataclasses.replace(state, accepted=accepted, since={}, expected=new)


def _log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _moved(passed: float, reached: float, shift: float) -> float:
    """How many of `reached` are accepted where the odds are other by this logarithm."""
    if shift == 0.0 or reached <= 0.0:
        return passed
    rate = min(max(passed / reached, 1 - _LIKELIEST), _LIKELIEST)
    return reached / (1 + math.exp(-_log_odds(rate) - shift))


def expected_tokens(state: AdaptiveState, rows: int, length: int, benefit: float = 0.0) -> float:
    """Tokens a round of a row with this draft length, from acceptance so far; at positions never drafted, as the last
    lessons found it, or else as at the one before. So many further tokens are taken to have been accepted at each
    position."""
    everywhere, here = _seen(state, 0), _seen(state, rows)
    total, survival, rate = 1.0, 1.0, _UNSEEN_ACCEPTANCE
    for position in range(length):
        if everywhere.reached[position] > 0:
            rate = (everywhere.passed[position] + benefit) / (everywhere.reached[position] + benefit)
        elif state.expected is not None and position < len(state.expected):
            rate = state.expected[position]
        survival *= (here.passed[position] + _OTHER_ROWS * rate) / (here.reached[position] + _OTHER_ROWS)
        total += survival
    return total


def _seen(state: AdaptiveState, rows: int) -> Counts:
    nothing = Counts.none(state.lengths[-1])
    return state.accepted.get(rows, nothing).plus(state.since.get(rows, nothing))


def expected_seconds(state: AdaptiveState, rows: int, length: int) -> float:
    """Seconds of a round at the present context: measured, or guessed from what was."""
    return math.exp(_log_cost(state, rows, length) + state.slowness)


def guessed_seconds(state: AdaptiveState, rows: int, lengths: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Seconds of rounds that were never run, by length: the guess, and the least that can be hoped for, half way
    between it and what the nearest shorter round costs.

    A guess that is too low is put right by trying; for one that is too high there is hope.
    """
    known = known_lengths(state, rows)
    found = {}
    for length, guess in _guessed(state, rows, lengths).items():
        shorter = [k for k in known if k < length]
        hope = (guess + min(guess, _log_cost(state, rows, shorter[-1]))) / 2 if shorter else guess
        found[length] = math.exp(guess + state.slowness), math.exp(hope + state.slowness)
    return found


def _log_cost(state: AdaptiveState, rows: int, length: int) -> float:
    """Of a round at the present context, at the pace of the beginning."""
    if (rows, length) not in state.costs:
        return _guessed(state, rows, [length])[length]
    cost = state.costs[rows, length]
    return _with_context(cost.log_seconds, _more(state, rows), state.context - cost.context)


def _guessed(state: AdaptiveState, rows: int, lengths: Sequence[int]) -> dict[int, float]:
    """The same, from the costs of others. Positions of a pass are compared where there is no context."""
    without = {
        (r, k): _with_context(cost.log_seconds, _more(state, r), -cost.context) for (r, k), cost in state.costs.items()
    }
    guesses = guessed_log_seconds(without, rows, lengths)
    return {length: _with_context(guess, _more(state, rows), state.context) for length, guess in guesses.items()}


def _with_context(log_seconds: float, more: float, change: float) -> float:
    """With so much more context, each unit of which takes `more` seconds."""
    seconds = math.exp(log_seconds)
    return math.log(max(seconds + more * change, _LEAST_SHARE * seconds))


def _more(state: AdaptiveState, rows: int) -> float:
    """What each token of context adds to a round with so many rows."""
    return rows * state.context_seconds


def _context_seconds(costs: Mapping[tuple[int, int], RoundCost]) -> float:
    """The same of each row, whatever is drafted: all positions of a row read the same keys and values, once.

    It is found in seconds as measured. The costs are at another pace, so that it is compared with them.
    """
    slope = slope_of(cost.moments.by_rows(rows) for (rows, _), cost in costs.items())
    at_first, measured = 0.0, 0.0
    for (rows, _), cost in costs.items():
        moments = cost.moments
        at_first += moments.weight * math.exp(cost.log_seconds)
        measured += moments.weight * (moments.seconds + slope * rows * (cost.context - moments.context))
    return slope * at_first / measured if measured > 0 else 0.0


def known_lengths(state: AdaptiveState, rows: int) -> list[int]:
    """Those whose cost with so many rows was measured, ascending."""
    return [k for k in state.lengths if (rows, k) in state.costs]


def expected_speed(state: AdaptiveState, rows: int, length: int) -> float:
    """Tokens a second of a row."""
    return expected_tokens(state, rows, length) / expected_seconds(state, rows, length)
