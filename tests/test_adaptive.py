"""The adaptive draft length, on simulated machines: what it chooses, what looking around costs, what it notices."""

import dataclasses
import functools as ft

import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, randomise, tiny_transformer

from eqx_specgrpo.decoding import AdaptiveLength, Coupled, FixedLength, SegmentObservation, SegmentPlan, decode
from eqx_specgrpo.decoding._adaptive_state import expected_seconds, expected_tokens
from eqx_specgrpo.decoding._context_costs import Moments, slope_of
from eqx_specgrpo.drafts import MedusaHeads


class Machine:
    """Decodes in no time, and says how long it would have taken.

    **Arguments:**

    - `cost`: seconds of a round by rows and length.
    - `rates`: the share accepted at each draft position among those that got there.
    - `noise`: relative, of the times.
    - `start`: seconds of a segment, whatever its rounds.
    """

    def __init__(self, cost, rates, noise=0.0, seed=0, start=0.0):
        self.cost, self.rates, self.noise, self.start = cost, rates, noise, start
        self.slowness, self.compile_seconds = 1.0, 0.0
        self.rng = np.random.default_rng(seed)
        self.compiled: set[tuple[int, int]] = set()

    def segment(self, rows: int, plan: SegmentPlan) -> SegmentObservation:
        active = rows * plan.max_rounds
        accepted, reached = [], active
        for rate in self.rates[: plan.length]:
            reached = int(self.rng.binomial(reached, rate))
            accepted.append(reached)
        slowness = self.slowness * np.exp(self.noise * self.rng.standard_normal())
        seconds = (self.start + plan.max_rounds * self.cost(rows, plan.length)) * slowness
        first = (rows, plan.length) not in self.compiled
        self.compiled.add((rows, plan.length))
        return SegmentObservation(
            rows=rows,
            plan=plan,
            rounds=plan.max_rounds,
            seconds=None if first else seconds,
            accepted=tuple(accepted),
            active_rounds=active,
            tokens=active + sum(accepted),
            compile_seconds=self.compile_seconds if first else 0.0,
        )


def _run(machine, controller, rows, seconds, state=None):
    """Tokens a second, plans and the last state, after so much simulated time."""
    state = controller.init(8) if state is None else state
    clock, tokens, plans = 0.0, 0, []
    while clock < seconds:
        plan = controller.choose(state, rows, 0)
        seen = machine.segment(rows, plan)
        state = controller.update(state, seen)
        plans.append((plan, seen))
        if seen.seconds is not None:
            clock, tokens = clock + seen.seconds, tokens + seen.tokens
    return tokens / clock, plans, state


def _best(machine, rows, lengths=(0, 1, 2, 3, 4)):
    def speed(k):
        return rows * (1 + np.cumprod(machine.rates[:k]).sum()) / machine.cost(rows, k)

    return max(lengths, key=speed), max(map(speed, lengths)), speed(0)


def _linear(rows, length):
    """Seconds of a round: a weight-bound part, and a part for every position of every row."""
    return 0.02 + 0.0008 * rows * (1 + length)


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("rates", [[0.9, 0.85, 0.8, 0.75], [0.6, 0.5, 0.4, 0.3], [0.3, 0.2, 0.2, 0.2]])
def test_it_finds_the_best_length_and_costs_little(rows, rates):
    """On average over machines: on some, two lengths that are about as fast are told apart late. A shorter one may be
    3% behind, and looking around costs 1%."""
    controller, found = AdaptiveLength(4), []
    for seed in range(4):
        machine = Machine(_linear, rates, noise=0.05, seed=seed)
        _, _, state = _run(machine, controller, rows, 5.0)
        found.append(_run(machine, controller, rows, 60.0, state)[0])
    best_rate = _best(machine, rows)[1]
    assert np.mean(found) > 0.96 * best_rate and min(found) > 0.9 * best_rate


def test_it_is_plain_decoding_where_speculation_does_not_pay():
    machine = Machine(lambda rows, length: 0.05 * (1 + length), [0.4] * 4)
    rate, plans, state = _run(machine, AdaptiveLength(4), 16, 100.0)
    assert rate > 0.97 * _best(machine, 16)[2]
    assert sum(state.lost.values()) <= 0.011 * state.clock + 0.3
    assert {plan.length for plan, _ in plans} == {0, 1}, "longer ones promised nothing, so they were not even compiled"


def test_it_notices_that_the_draft_has_learned():
    machine = Machine(_linear, [0.1, 0.1, 0.1, 0.1])
    controller = AdaptiveLength(4)
    _, plans, state = _run(machine, controller, 16, 60.0)
    assert plans[-1][0].length == 0
    machine.rates = [0.95, 0.95, 0.95, 0.95]
    rate, plans, _ = _run(machine, controller, 16, 120.0, state)
    assert plans[-1][0].length >= 3
    assert rate > 0.8 * _best(machine, 16)[1]


def test_it_notices_that_the_draft_has_gone_stale():
    machine = Machine(_linear, [0.95, 0.95, 0.95, 0.95])
    controller = AdaptiveLength(4)
    _, plans, state = _run(machine, controller, 16, 60.0)
    assert plans[-1][0].length >= 3
    machine.rates = [0.05, 0.05, 0.05, 0.05]
    rate, plans, _ = _run(machine, controller, 16, 120.0, state)
    assert plans[-1][0].length == 0
    assert rate > 0.9 * _best(machine, 16)[2]


def _while_it_learns(lesson, seed, rate_of_step=lambda step: min(0.75, 0.35 + 0.05 * step)):
    """Tokens a second, and the share of rounds that drafted, in the last ten of twenty steps.

    **Arguments:**

    - `lesson`: what the controller is told after a step, of what is accepted; `None` to tell it nothing.
    """
    machine = Machine(lambda rows, length: 0.1 + 0.045 * length, [], noise=0.05, seed=seed)
    controller, rng = AdaptiveLength(4), np.random.default_rng(seed)
    state, last_plans = controller.init(4), []
    for step in range(20):
        # A step has few prompts, and they are easy or hard to draft for at all positions.
        rate = rate_of_step(step) + 0.03 * rng.standard_normal()
        machine.rates = [rate, 0.9 * rate, 0.9 * rate, 0.9 * rate]
        _, plans, state = _run(machine, controller, 16, 12.0, state)
        if lesson is not None:  # on what has just been decoded
            state = controller.after_training(state, [lesson(a) for a in machine.rates])
        last_plans += plans if step >= 10 else []
    timed = [seen for _, seen in last_plans if seen.seconds is not None]
    drafted = sum(seen.rounds for seen in timed if seen.plan.length > 0) / sum(seen.rounds for seen in timed)
    return sum(seen.tokens for seen in timed) / sum(seen.seconds for seen in timed), drafted


@ft.cache
def _untold():
    return np.array([_while_it_learns(None, seed) for seed in range(6)])


@pytest.mark.parametrize("lesson", [lambda a: a, lambda a: 0.85 * a, lambda a: 2 * a / (1 + a)])
def test_a_draft_that_learns_is_used_as_soon_as_it_pays(lesson):
    """Its lessons say so, even if they are off by as much at all times, as with rows that are hard to draft for or with
    `Coupled`, which keeps (1 - d) / (1 + d) where lessons find 1 - d; looks of a few rounds are not enough to."""
    told, untold = np.array([_while_it_learns(lesson, seed) for seed in range(6)]), _untold()
    assert told[:, 1].min() > 0.9 and untold[:, 1].mean() < told[:, 1].mean() - 0.05
    assert told[:, 0].mean() > 1.01 * untold[:, 0].mean()


def test_lessons_of_a_draft_that_does_not_pay_cost_nothing():
    rates = np.array([_while_it_learns(lambda a: a, seed, lambda step: 0.4) for seed in range(4)])
    assert rates[:, 1].max() < 0.05 and rates[:, 0].min() > 0.97 * 160


def _moved(rate, before, after):
    """A share whose odds are moved as from one acceptance to another."""
    odds = rate / (1 - rate) * (after / (1 - after)) / (before / (1 - before))
    return odds / (1 + odds)


def test_a_lesson_moves_the_odds_of_what_was_seen():
    """What was seen since the last lesson belongs to this one, and what was seen before to the mean of the earlier."""
    controller = AdaptiveLength(2)
    state = controller.after_training(controller.init(2), [0.5, 0.2])
    assert expected_tokens(state, 16, 2) == pytest.approx(1 + 0.5 + 0.5 * 0.2), (
        "nothing was drafted: as the lesson says"
    )
    machine = Machine(_linear, [0.75, 0.5])
    for _ in range(200):
        state = controller.update(state, machine.segment(16, SegmentPlan(2, 8)))
    seen = [state.since[0].passed[i] / state.since[0].reached[i] for i in (0, 1)]
    assert seen == pytest.approx([0.75, 0.5], abs=0.03) and state.since[0].reached[0] > 2000

    moved = controller.after_training(state, [0.8, 0.2])  # 0.65 in the running mean
    again = controller.after_training(moved, [0.85, 0.2])  # 0.75, with nothing seen between them
    first, second = _moved(seen[0], 0.8, 0.65), _moved(_moved(seen[0], 0.8, 0.65), 0.65, 0.75)
    assert first < seen[0] < 0.8 and first < second
    for which in (0, 16):
        for counts, expected in ((moved.accepted[which], first), (again.accepted[which], second)):
            assert counts.passed[0] / counts.reached[0] == pytest.approx(expected)
            assert counts.passed[1] / counts.reached[1] == pytest.approx(seen[1], abs=1e-6)
            assert counts.reached[0] == pytest.approx(500), "seen with other weights: a few segments outweigh it"
    assert not moved.since and expected_tokens(moved, 16, 1) == pytest.approx(1 + first)
    unknown = controller.after_training(state, None)
    assert unknown.accepted[0].passed[0] / unknown.accepted[0].reached[0] == pytest.approx(seen[0])
    assert unknown.accepted[0].reached[0] == pytest.approx(500) and unknown.expected == (0.5, 0.2)


def test_a_step_that_is_easy_to_draft_for_spoils_none_that_follow():
    """The first completions repeat themselves, and nearly all guesses are accepted. That its lesson found so, and the
    next ones less, says nothing against what was seen beside those next lessons."""
    machine, controller = Machine(lambda rows, length: 0.04 + 0.018 * length, [0.95] * 3), AdaptiveLength(3)
    state, plans = controller.init(3), []
    for rate in (0.95, 0.5, 0.75, 0.75, 0.75):
        machine.rates = [rate, 0.6 * rate, 0.6 * rate]
        _, plans, state = _run(machine, controller, 8, 10.0, state)
        state = controller.after_training(state, [min(1.04 * a, 0.98) for a in machine.rates])
    drafted = sum(plan.max_rounds for plan, _ in plans if plan.length == 1)
    assert drafted > 0.8 * sum(plan.max_rounds for plan, _ in plans)


def test_the_first_lesson_has_nothing_to_be_compared_with():
    controller, machine = AdaptiveLength(2), Machine(_linear, [0.75, 0.5])
    state = controller.update(controller.init(2), machine.segment(16, SegmentPlan(2, 8)))
    after = controller.after_training(state, [0.3, 0.3])
    assert (after.accepted, after.since, after.expected) == (state.since, {}, (0.3, 0.3))


def test_lessons_of_certain_tokens_and_of_none_are_no_infinite_odds():
    controller = AdaptiveLength(1)
    state, machine = controller.init(1), Machine(_linear, [1.0])
    for acceptance in ([0.0], [1.0], [1.0], [0.0], None, [0.5]):
        state = controller.after_training(state, acceptance)
        state = controller.update(state, machine.segment(4, SegmentPlan(1, 8)))
        assert 1.0 < expected_tokens(state, 4, 1) <= 2.0


@pytest.mark.parametrize("slowness", [0.6, 1.6])
def test_a_machine_that_changes_its_pace_changes_no_choice(slowness):
    """Two lengths are compared as if they had been measured at one time: what was measured long ago is not taken for
    cheap or dear because other work has come to the machine since, or gone."""
    machine = Machine(lambda rows, length: 0.05 + 0.015 * length, [0.6, 0.3])
    controller = AdaptiveLength(2)
    _, plans, state = _run(machine, controller, 16, 60.0)
    assert plans[-1][0].length == 1
    machine.slowness = slowness
    _, plans, state = _run(machine, controller, 16, 60.0 * slowness, state)
    last = [plan for plan, _ in plans if plan.length == 1][-1]
    assert last.expected.seconds_per_round == pytest.approx(slowness * 0.065, rel=0.05)
    for number in range(30):
        machine.slowness = slowness if number % 2 else 1.0
        _, more, state = _run(machine, controller, 16, 3.0, state)
        plans += more
    rounds = {k: sum(plan.max_rounds for plan, _ in plans if plan.length == k) for k in (0, 1, 2)}
    assert rounds[1] > 0.85 * sum(rounds.values())


def test_rows_that_are_left_at_the_end_may_be_hard_to_draft_for():
    machine, controller = Machine(lambda rows, length: 0.05 + 0.01 * length, []), AdaptiveLength(3)
    state, rounds = controller.init(3), {16: [0] * 4, 4: [0] * 4}
    for number in range(400):
        rows = 4 if number % 10 >= 8 else 16
        machine.rates = [0.9, 0.9, 0.9] if rows == 16 else [0.1, 0.1, 0.1]
        plan = controller.choose(state, rows, 0)
        if number >= 100:
            rounds[rows][plan.length] += plan.max_rounds
        state = controller.update(state, machine.segment(rows, plan))
    assert rounds[16][3] > 0.85 * sum(rounds[16]) and rounds[4][0] > 0.8 * sum(rounds[4])


@pytest.mark.parametrize("rows, gain, length", [(1, 1.02, 0), (1, 1.06, 1), (16, 1.06, 0), (16, 1.11, 1)])
def test_of_two_lengths_that_are_about_as_fast_the_shorter_is_taken(rows, gain, length):
    """With more than one row, what uneven ends cost comes on top."""
    machine = Machine(lambda rows, k: 0.05 if k == 0 else 0.05 * 1.5 / gain, [0.5])
    _, plans, _ = _run(machine, AdaptiveLength(1), rows, 200.0)
    rounds = [plan.max_rounds for plan, _ in plans if plan.length == length]
    assert sum(rounds) > 0.8 * sum(plan.max_rounds for plan, _ in plans)


def _decode_to_the_end(machine, controller, state, rng, rows, tokens, spread=0.1):
    """Seconds and state after a decoding whose rows are not equally hard to draft for, and shrink away as they end."""
    rates = np.clip(machine.rates[0] + spread * rng.standard_normal(rows), 0, 1)
    left, seconds, bucket = np.full(rows, tokens), 0.0, rows
    while left.any():
        while bucket > 1 and (left > 0).sum() <= bucket // 2:
            bucket //= 2
        plan = controller.choose(state, bucket, 0)
        rounds, active, accepted = 0, 0, 0
        while rounds < plan.max_rounds and (left > 0).sum() > (bucket // 2 if bucket > 1 else 0):
            alive = left > 0
            hit = alive & (rng.random(rows) < rates) if plan.length else np.zeros(rows, bool)
            left = np.maximum(left - alive - hit, 0)
            rounds, active, accepted = rounds + 1, active + int(alive.sum()), accepted + int(hit.sum())
        taken = machine.start + rounds * machine.cost(bucket, plan.length)
        taken *= np.exp(machine.noise * rng.standard_normal())
        seconds += taken
        state = controller.update(
            state,
            SegmentObservation(
                rows=bucket,
                plan=plan,
                rounds=rounds,
                seconds=taken,
                accepted=(accepted,) * plan.length,
                active_rounds=active,
                tokens=active + accepted,
            ),
        )
    return seconds, state


def _mean_seconds(machine, rows, tokens, decodings, seeds, learning=4):
    """Of a decoding, once the controller has learned from a few."""
    controller, seconds = AdaptiveLength(1), []
    for seed in range(seeds):
        state, rng = controller.init(1), np.random.default_rng(seed)
        for number in range(learning + decodings):
            taken, state = _decode_to_the_end(machine, controller, state, rng, rows, tokens)
            if number >= learning:
                seconds.append(taken)
    return np.mean(seconds)


@pytest.mark.parametrize("gain", [0.95, 1.0, 1.05, 1.1, 1.3])
def test_rows_that_end_at_different_times_do_not_make_it_slower_than_plain_decoding(gain):
    """Those of a plain decoding all end at the limit. What a round yields in its time does not show it."""

    def cost(rows, length):
        return (0.02 + 0.001 * rows) * (1.75 / gain if length else 1.0)

    seconds = _mean_seconds(Machine(cost, [0.75], noise=0.05), rows=32, tokens=64, decodings=20, seeds=12)
    assert seconds < 64 * cost(32, 0) / (0.99 if gain < 1.2 else 1.15)


@pytest.mark.parametrize("gain", [0.9, 1.0])
def test_what_the_host_does_for_a_segment_does_not_show(gain):
    """15 ms at the start of each, as were measured with 16 rows of SmolLM2-135M in float32 on two cores."""

    def cost(rows, length):
        return (0.032 + 0.0035 * rows) * (1.75 / gain if length else 1.0)

    machine = Machine(cost, [0.75], noise=0.05, start=0.015)
    plain = 128 * cost(16, 0) + 2 * machine.start  # 64 rounds a segment
    # On this machine few rows gain no more than many, as they are thought to: trying that is in it.
    assert _mean_seconds(machine, rows=16, tokens=128, decodings=10, seeds=6) < plain / 0.97


def test_a_close_rival_is_looked_at_more_often_than_one_far_behind():
    speeds = {0: 0.99, 1: 1.1, 2: 0.85}
    machine = Machine(lambda rows, k: 0.05 * (1, 1.9, 2.71)[k] / speeds[k], [0.9, 0.9])
    _, plans, state = _run(machine, AdaptiveLength(2), 16, 400.0)
    looks = {k: sum(plan.length == k for plan, _ in plans) for k in speeds}
    assert looks[0] > 1.5 * looks[2] > 0 and sum(state.lost.values()) < 0.015 * state.clock


def test_nothing_is_compiled_before_it_would_have_paid():
    """As one rents skis until the rent would have bought them."""
    machine, controller = Machine(lambda rows, length: 0.05, [0.8, 0.8]), AdaptiveLength(2)
    machine.compile_seconds = 3.0
    _, plans, state = _run(machine, controller, 16, 2.0)
    assert machine.compiled == {(16, 0)}, "not even the first length would have paid yet"
    _, plans, state = _run(machine, controller, 16, 30.0, state)
    assert plans[-1][0].length == 2
    for _ in range(20):  # 8 to 16 rounds with few rows, now and then
        for _ in range(2):
            state = controller.update(state, machine.segment(4, controller.choose(state, 4, 0)))
        _, _, state = _run(machine, controller, 16, 1.0, state)
    assert {kind for kind in machine.compiled if kind[0] == 4} == {(4, 2)}, "what is best for 16 rows, and that alone"


def test_what_will_be_used_for_long_is_compiled_sooner():
    """Once a quarter of its compilation would have been saved so far, early in a run of many steps."""

    def compiled(left):
        machine, controller = Machine(lambda rows, length: 0.05, [0.8, 0.8]), AdaptiveLength(2)
        machine.compile_seconds = 3.0
        state = controller.with_future(controller.init(2), left)
        _run(machine, controller, 16, 6.0, state)
        return machine.compiled

    assert compiled(0.5) == {(16, 0)} and len(compiled(4.0)) > 1
    machine, controller = Machine(lambda rows, length: 0.05 * (1 + length), [0.4] * 4), AdaptiveLength(4)
    machine.compile_seconds = 3.0
    _run(machine, controller, 16, 60.0, controller.with_future(controller.init(4), 100.0))
    assert machine.compiled <= {(16, 0), (16, 1)}, "what promises nothing is not worth it, however long the run"


def test_where_programs_are_missing_only_what_pays_is_compiled():
    """Prompts of another width and larger caches need programs of their own, for each length."""
    machine, controller = Machine(_linear, [0.9, 0.85, 0.8, 0.8], noise=0.05), AdaptiveLength(4)
    machine.compile_seconds = 10.0
    _, _, state = _run(machine, controller, 4, 60.0)
    assert len(machine.compiled) > 2
    for _ in range(10):
        machine.compiled = set()
        state, left = _sparingly(machine, controller, 4, 8.0, state)
        assert left > 0 and machine.compiled == {(4, _best(machine, 4)[0])}


def _usual(plan):
    """What is done where nothing is measured again."""
    while plan.otherwise is not None:
        plan = plan.otherwise
    return plan


def _sparingly(machine, controller, rows, seconds, state):
    """Decodes for so long, and compiles nothing only to measure it again; the state, and how often that was so."""
    clock, left = state.clock, 0
    while state.clock < clock + seconds:
        plan = controller.choose(state, rows, 0)
        while plan.otherwise is not None and (rows, plan.length) not in machine.compiled:
            plan, left = plan.otherwise, left + 1
        state = controller.update(state, machine.segment(rows, plan))
    return state, left


def test_a_length_that_was_compiled_and_never_measured_is_tried_where_it_is_not_compiled():
    """It was compiled at the end of a decoding, and the next one has longer prompts."""
    machine, controller = Machine(_linear, [0.9]), AdaptiveLength(1)
    machine.compile_seconds = 3.0
    state, _ = _sparingly(machine, controller, 8, 1.0, controller.init(1))
    state = controller.update(state, machine.segment(8, SegmentPlan(1, 2)))
    assert (8, 1) in state.seen and (8, 1) not in state.costs
    machine.compiled = {(8, 0)}
    state, _ = _sparingly(machine, controller, 8, 60.0, state)
    plan = controller.choose(state, 8, 0)
    assert (8, 1) in machine.compiled and _usual(plan).length == 1


def test_plain_decoding_is_measured_again_though_it_has_to_be_compiled():
    """With prompts as long as these drafting does not pay any more. One in twenty compilations' time tells."""
    machine, controller = Machine(_linear, [0.8]), AdaptiveLength(1)
    machine.compile_seconds = 2.0
    _, plans, state = _run(machine, controller, 8, 60.0)
    assert plans[-1][0].length == 1
    machine.compiled, machine.cost = {(8, 1)}, lambda rows, length: 0.04 * (1 + length)
    state, _ = _sparingly(machine, controller, 8, 20.0, state)
    assert (8, 0) not in machine.compiled
    state, _ = _sparingly(machine, controller, 8, 60.0, state)
    plan = controller.choose(state, 8, 0)
    assert _usual(plan).length == 0


def test_a_length_whose_program_is_missing_keeps_no_other_from_being_measured():
    """A run measured plain decoding in 3 of 42 steps: a length that was not compiled was always due first."""
    machine, controller = Machine(_linear, [0.9, 0.85, 0.8, 0.8], noise=0.05), AdaptiveLength(4)
    machine.compile_seconds = 4.0
    _, plans, state = _run(machine, controller, 4, 60.0)
    best = plans[-1][0].length
    missing = {(4, k) for k in (1, 2, 3, 4) if k != best}
    assert best > 0 and missing & state.costs.keys()
    for compiled, within in (({(4, best), (4, 0)}, 20.0), ({(4, best)}, 85.0)):
        # In the second case plain decoding has to be compiled, after twenty times as long as that takes.
        machine.compiled = set(compiled)
        state, _ = _sparingly(machine, controller, 4, 85.0, state)
        assert state.clock - state.costs[4, 0].looked_at < within
        assert (4, 0) in machine.compiled and not missing & machine.compiled


def test_kinds_that_turn_out_to_be_compiled_already_are_tried_sooner():
    machine, controller = Machine(lambda rows, length: 0.05, [0.8, 0.8, 0.8, 0.8]), AdaptiveLength(4)
    machine.compile_seconds = 8.0
    machine.compiled = {(16, 1), (16, 2), (16, 3)}
    state = _run(machine, controller, 16, 60.0)[2]
    assert (16, 4) in machine.compiled and state.compile_seconds == 8.0
    assert {k for _, k in state.seen} == {0, 1, 4}, "that nothing gets dearer is known after one of them"
    early = _run(Machine(machine.cost, machine.rates), controller, 16, 3.0, controller.init(4))[2]
    assert early.compile_seconds == 0 and {k for _, k in early.seen} == {0, 1, 4}


@pytest.mark.parametrize("acceptance, best", [(0.8, 4), (0.05, 0)])
@pytest.mark.parametrize("disturbed", [0, 1])
def test_one_disturbed_measurement_does_not_decide_for_ever(acceptance, best, disturbed):
    """The first timed segment of a length takes twice as long as it should."""

    class Disturbed(Machine):
        def segment(self, rows, plan):
            seen = super().segment(rows, plan)
            if seen.seconds is not None and plan.length == disturbed and not self.done:
                self.done = True
                return dataclasses.replace(seen, seconds=2 * seen.seconds)
            return seen

    machine = Disturbed(_linear, [acceptance] * 4)
    machine.done = False
    rate, plans, _ = _run(machine, AdaptiveLength(4), 4, 300.0)
    late = plans[len(plans) // 2 :]
    rounds = {k: sum(plan.max_rounds for plan, _ in late if plan.length == k) for k in range(5)}
    assert machine.done and max(rounds, key=rounds.__getitem__) == best and rate > 0.93 * _best(machine, 4)[1]


def test_of_the_first_looks_one_that_met_a_pause_does_not_count():
    """Their median does; with their mean, a length that met a pause would seem a quarter dearer than it is."""
    machine, controller = Machine(lambda rows, length: 0.05, [0.8]), AdaptiveLength(1)
    state = controller.init(1)
    for slowness in (1.0, 1.0, 2.0, 1.0):  # the first compiles
        machine.slowness = slowness
        state = controller.update(state, machine.segment(16, SegmentPlan(0, max_rounds=4)))
    assert state.costs[16, 0].looks == 3
    assert expected_seconds(state, 16, 0) == pytest.approx(0.05)


def test_what_was_compiled_is_measured_at_once():
    """A compilation that takes longer than the ones before is no reason to leave its program lying idle."""
    machine, controller = Machine(lambda rows, length: 0.05, [0.8]), AdaptiveLength(1)
    state = controller.init(1)
    for _ in range(200):
        plan = controller.choose(state, 16, 0)
        machine.compile_seconds = 13.0 if plan.length else 2.0
        seen = machine.segment(16, plan)
        state = controller.update(state, seen)
        if plan.length and seen.seconds is None:
            assert controller.choose(state, 16, 0).length == 1
            return
    raise AssertionError("the longer length was never tried")


def test_a_state_of_another_controller_is_refused():
    with pytest.raises(ValueError, match=r"not one of AdaptiveLength\(1\)"):
        AdaptiveLength(1).choose(AdaptiveLength(3).init(3), 4, 0)


def test_what_is_known_of_other_rows_saves_trying():
    machine = Machine(lambda rows, length: 0.003 * rows * (1 + length), [0.4] * 4)
    controller = AdaptiveLength(4)
    _, _, state = _run(machine, controller, 16, 20.0)
    _, plans, _ = _run(machine, controller, 8, 3.0, state)
    assert {plan.length for plan, _ in plans} == {0}


def test_a_length_that_pays_is_found_and_one_that_cannot_is_never_compiled():
    """Costs much like those of SmolLM2-135M in float32 (docs/experiments.md): with four rows three guesses are ahead of
    one; with sixteen two cost more than they give."""
    seconds = {(16, 0): 77, (16, 1): 110, (16, 2): 155, (16, 3): 190, (8, 0): 59, (4, 0): 47, (4, 1): 56, (4, 2): 70,
               (4, 3): 75}  # fmt: skip
    machine = Machine(lambda rows, k: seconds.get((rows, k), 77 + 2.3 * (rows * (k + 1) - 16)) / 1e3, [0.8, 0.7, 0.7])
    machine.compile_seconds, controller = 5.0, AdaptiveLength(3)
    state = controller.init(3)
    for _ in range(30):
        for rows, share in ((16, 4.0), (8, 2.0), (4, 6.0)):
            _, plans, state = _run(machine, controller, rows, share, state)
    assert plans[-1][0].length == 3 and (4, 3) in machine.compiled
    assert not {(16, 2), (16, 3)} & machine.compiled
    assert controller.metrics(state)["spec/lengths_unpaid"] <= 2


def test_a_cost_that_was_guessed_too_high_is_put_right_by_patience():
    """Beyond four positions a round costs no more. By the curve up to there no length can pay, not even if all is
    accepted."""
    machine = Machine(lambda rows, k: 0.02 * min(rows * (k + 1), 4), [0.6, 0.6, 0.6])
    machine.compile_seconds, controller = 2.0, AdaptiveLength(3)
    state = controller.init(3)
    for rows in (1, 2, 4):  # a curve that rises
        _, _, state = _run(machine, controller, rows, 1.0, state)
    _, plans, state = _run(machine, controller, 4, 60.0, state)
    assert {plan.length for plan, _ in plans} == {0}
    _, plans, state = _run(machine, controller, 4, 400.0, state)
    assert plans[-1][0].length == 3


def test_what_a_plain_round_takes_is_known_of_other_rows():
    controller, machine = AdaptiveLength(2), Machine(_linear, [0.5, 0.5])
    state = controller.init(2)
    assert controller.round_seconds(state, 4, 0, 0.0) is None and FixedLength(2).round_seconds(2, 4, 0, 0.0) is None
    for rows in (2, 16):
        _, _, state = _run(machine, controller, rows, 5.0, state)
    assert controller.round_seconds(state, 16, 0, 0.0) == pytest.approx(_linear(16, 0), rel=0.02)
    assert controller.round_seconds(state, 8, 0, 0.0) == pytest.approx(_linear(8, 0), rel=0.05)


def _with_contexts(rows, length, context):
    """As measured with SmolLM2-135M on two cores: at 600 tokens the context takes as long as all else of a round."""
    return 0.034 + (0.0025 + 0.0023 * length + 1.06e-5 * context) * rows


def _decode_alike(machine_cost, controller, state, rng, rows, tokens, rate, noise=0.03):
    """Decodes rows that end together: seconds by draft length and by quarter of the completion, and the last state."""
    position, rounds = 1.0, np.zeros((4, 9))
    while position < tokens:
        plan = controller.choose(state, rows, int(position))
        gain = 1 + np.cumprod([rate] * plan.length).sum()
        last = min(position + plan.max_rounds * gain, tokens)
        number = max(1, round((last - position) / gain))
        seconds = number * machine_cost(rows, plan.length, (position + last) / 2)
        seconds *= np.exp(noise * rng.standard_normal())
        passed = rng.binomial(rows * number, np.cumprod([rate] * plan.length))
        rounds[int(4 * position / tokens), plan.length] += number
        state = controller.update(
            state,
            SegmentObservation(
                rows=rows,
                plan=plan,
                rounds=number,
                seconds=seconds,
                accepted=tuple(passed.tolist()),
                active_rounds=rows * number,
                tokens=rows * number + int(passed.sum()),
                context=(position + last) / 2,
            ),
        )
        position = last
    return rounds, state


def test_guesses_that_pay_only_with_a_long_context_are_made_there():
    """At the beginning a round with one guess costs 1.34 plain ones and gives 1.36 tokens, at the end it costs 1.13."""
    controller, rng, rounds = AdaptiveLength(3), np.random.default_rng(0), np.zeros((4, 9))
    state = controller.init(3)
    for number in range(8):
        seen, state = _decode_alike(_with_contexts, controller, state, rng, 8, 1024, 0.36)
        rounds += seen if number >= 4 else 0
    drafted = rounds[:, 1:].sum(1) / rounds.sum(1)
    assert drafted[0] < 0.35 and drafted[2:].min() > 0.85
    assert [_usual(controller.choose(state, 8, context)).length for context in (1, 1000)] == [0, 1]


@pytest.mark.parametrize("slowness", [1.0, 1.7])
def test_what_a_context_adds_is_known_at_any_pace(slowness):
    """Also of lengths that were measured with other contexts, and with another number of rows."""
    controller, rng = AdaptiveLength(1), np.random.default_rng(1)
    state = controller.init(1)
    for number in range(10):
        pace = slowness if number >= 6 else 1.0
        _, state = _decode_alike(lambda *kind: pace * _with_contexts(*kind), controller, state, rng, 8, 900, 0.8)  # noqa: B023
    for length in (0, 1):
        for context in (50.0, 450.0, 850.0):
            known = controller.round_seconds(state, 8, length, context)
            assert known == pytest.approx(slowness * _with_contexts(8, length, context), rel=0.12)
    added = controller.round_seconds(state, 4, 0, 850.0) - controller.round_seconds(state, 4, 0, 50.0)
    assert added == pytest.approx(slowness * 4 * 800 * 1.06e-5, rel=0.2)


def test_a_slope_is_that_of_least_squares_with_a_constant_for_each_kind_and_decoding():
    """The second decoding has longer contexts on a slower machine."""
    rng, kinds, rows = np.random.default_rng(2), [], []
    for kind in range(3):
        moments = Moments()
        for number, context in enumerate(np.concatenate([rng.uniform(0, 200, 20), rng.uniform(400, 1000, 20)])):
            decoding = number // 20
            seconds = 0.05 * (kind + 1) + 0.04 * decoding + 2e-5 * context + 1e-3 * rng.standard_normal()
            moments = moments.plus(context, seconds, decoding)
            rows.append((2 * kind + decoding, context, seconds, np.exp(-(39 - number) / 300)))
        kinds.append(moments)
    group, context, seconds, weight = map(np.array, zip(*rows, strict=True))
    columns = np.stack([*(group == one for one in range(6)), context], 1) * np.sqrt(weight)[:, None]
    expected = np.linalg.lstsq(columns, seconds * np.sqrt(weight), rcond=None)[0][6]
    assert slope_of(kinds) == pytest.approx(expected, rel=1e-2)
    assert expected == pytest.approx(2e-5, rel=0.1)


def test_a_slow_machine_is_no_long_context():
    """Short contexts were decoded on a fast machine, long ones on a slow one."""
    controller, rng = AdaptiveLength(1), np.random.default_rng(4)
    state = controller.init(1)
    for _ in range(6):
        _, state = _decode_alike(_with_contexts, controller, state, rng, 8, 120, 0.8, noise=0.01)
    _, state = _decode_alike(lambda *kind: 1.5 * _with_contexts(*kind), controller, state, rng, 8, 900, 0.8, noise=0.01)
    added = controller.round_seconds(state, 8, 0, 850.0) - controller.round_seconds(state, 8, 0, 50.0)
    assert added == pytest.approx(1.5 * 8 * 800 * 1.06e-5, rel=0.2)


def test_noise_is_no_slope():
    """Nor are a few segments, nor rounds that become quicker: what was known before holds."""
    rng, found = np.random.default_rng(3), []
    for _ in range(200):
        moments = Moments()
        for context in range(0, 400, 20):
            moments = moments.plus(float(context), 0.1 * np.exp(0.1 * rng.standard_normal()))
        found.append(slope_of([moments]))
    # Left to itself, least squares would find 0.8e-5 to either side.
    assert np.mean(np.array(found) == 0.0) > 0.75 and np.mean(found) < 0.4 * 1.8e-5
    assert slope_of([]) == slope_of([Moments().plus(3.0, 0.1)]) == slope_of([Moments()]) == 0.0
    two = Moments().plus(1.0, 0.1).plus(2.0, 0.3)
    # Two segments have no error to compare a slope with, and one that is alone in its decoding says nothing.
    assert slope_of([two]) == slope_of([two.plus(5.0, 0.9, 1)]) == 0.0
    falls = Moments()
    for context in range(20):
        falls = falls.plus(float(context), 1.0 - 0.01 * context)
    assert slope_of([falls]) == 0.0


def test_expectations_are_what_comes():
    machine = Machine(_linear, [0.8, 0.7, 0.6, 0.5])
    _, plans, _ = _run(machine, AdaptiveLength(4), 8, 30.0)
    for plan, seen in plans[len(plans) // 2 :]:
        assert plan.expected is not None
        assert seen.seconds / seen.rounds == pytest.approx(plan.expected.seconds_per_round, rel=1e-6)
        if plan.max_rounds * 8 > 100:
            assert seen.tokens / seen.active_rounds == pytest.approx(plan.expected.tokens_per_round, rel=0.25)


def test_the_longest_length_is_a_bound():
    assert AdaptiveLength(8).init(3).lengths == (0, 1, 2, 3)
    assert AdaptiveLength(2).init(8).lengths == (0, 1, 2)
    assert AdaptiveLength(8).init(8).lengths == (0, 1, 2, 3, 4, 6, 8)
    assert AdaptiveLength(7).init(8).lengths == (0, 1, 2, 3, 4, 6, 7)
    assert AdaptiveLength(5).init(8).lengths == (0, 1, 2, 3, 4, 5)
    assert AdaptiveLength(4).init(0).lengths == (0,)
    with pytest.raises(ValueError, match="lengths are 0 to 8"):
        AdaptiveLength(9)
    with pytest.raises(ValueError, match="share of the time"):
        AdaptiveLength(4, exploration=2.0)


def test_decoding_with_it_is_lossless_and_its_state_goes_on():
    """In the real decoder, where the clock decides: under coupling the tokens are still plain decoding's."""
    target, heads = tiny_transformer(), randomise(MedusaHeads.fresh(16, 2), 0, 0.3)
    settings = dict(verifier=Coupled(), key=jr.key(1), max_new_tokens=40, smallest_bucket=8)
    prompts = [[1 + i, 2, 3] for i in range(8)]
    with quick_compilation():
        plain = decode(target, prompts, length=FixedLength(0), **settings)
        states, seen = [None], []

        def keep(observation, state):
            states.append(state)
            seen.append(observation)

        for _ in range(2):
            found = decode(
                target,
                prompts,
                draft=heads,
                length=AdaptiveLength(2),
                length_state=states[-1],
                on_segment=keep,
                **settings,
            )
            np.testing.assert_array_equal(found.tokens, plain.tokens)
            assert sum(segment.tokens for segment in seen) + 8 == found.lengths.sum()
            seen.clear()
    assert states[-1].clock > 0 and (8, 0) in states[-1].costs
