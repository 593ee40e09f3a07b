"""The adaptive draft length, on simulated machines: what it chooses, what looking around costs, what it notices."""

import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, randomise, tiny_transformer

from eqx_specgrpo.decoding import AdaptiveLength, Coupled, FixedLength, SegmentObservation, SegmentPlan, decode
from eqx_specgrpo.drafts import MedusaHeads


class Machine:
    """Decodes in no time, and says how long it would have taken.

    **Arguments:**

    - `cost`: seconds of a round by rows and length.
    - `rates`: the share accepted at each draft position among those that got there.
    - `noise`: relative, of the times.
    """

    def __init__(self, cost, rates, noise=0.0, seed=0):
        self.cost, self.rates, self.noise = cost, rates, noise
        self.rng = np.random.default_rng(seed)
        self.compiled: set[tuple[int, int]] = set()

    def segment(self, rows: int, plan: SegmentPlan) -> SegmentObservation:
        active = rows * plan.max_rounds
        accepted, reached = [], active
        for rate in self.rates[: plan.length]:
            reached = int(self.rng.binomial(reached, rate))
            accepted.append(reached)
        seconds = plan.max_rounds * self.cost(rows, plan.length) * np.exp(self.noise * self.rng.standard_normal())
        first = (rows, plan.length) not in self.compiled
        self.compiled.add((rows, plan.length))
        return SegmentObservation(
            rows, plan, plan.max_rounds, None if first else seconds, tuple(accepted), active, active + sum(accepted)
        )


def _run(machine, controller, rows, seconds, state=None):
    """Tokens a second, plans and the last state, after so much simulated time."""
    state = controller.init(8) if state is None else state
    clock, tokens, plans = 0.0, 0, []
    while clock < seconds:
        plan = controller.choose(state, rows)
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
    machine = Machine(_linear, rates, noise=0.05)
    controller = AdaptiveLength(4)
    _, _, state = _run(machine, controller, rows, 5.0)
    rate, plans, _ = _run(machine, controller, rows, 60.0, state)
    best, best_rate, plain_rate = _best(machine, rows)
    assert rate > 0.95 * best_rate and rate > 0.95 * plain_rate
    lengths = [plan.length for plan, seen in plans for _ in range(plan.max_rounds)]
    chosen = max(set(lengths), key=lengths.count)
    assert chosen == best or rate > 0.97 * best_rate  # a tie, but for noise


def test_it_is_plain_decoding_where_speculation_does_not_pay():
    machine = Machine(lambda rows, length: 0.05 * (1 + length), [0.4] * 4)
    rate, plans, state = _run(machine, AdaptiveLength(4), 16, 100.0)
    assert rate > 0.97 * _best(machine, 16)[2]
    assert state.lost <= 0.011 * state.clock + 0.3
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


def test_what_is_known_of_other_rows_saves_trying():
    machine = Machine(lambda rows, length: 0.05 * (1 + length), [0.4] * 4)
    controller = AdaptiveLength(4)
    _, _, state = _run(machine, controller, 16, 20.0)
    _, plans, _ = _run(machine, controller, 8, 3.0, state)
    assert {plan.length for plan, _ in plans} == {0}


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
    assert states[-1].clock > 0 and (8, 0) in states[-1].seconds
