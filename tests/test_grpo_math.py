import functools
import math
import operator

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend import core as jax_core

from eqx_specgrpo.grpo import (
    LossNormalizer,
    PolicyLossMetrics,
    chunked_logprobs,
    frac_reward_zero_std,
    group_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    leave_one_out_advantages,
    make_policy_loss,
    next_token_positions,
    policy_loss,
)
from eqx_specgrpo.grpo.losses import DAPO

#
# Advantages
#


def test_group_advantages_by_hand():
    rewards = np.array([1.0, 0, 0, 1, 1, 0, 0, 0])
    group = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    advantages = group_advantages(rewards, group, 2)
    assert advantages.dtype == np.float32
    expected = [0.86588, -0.86588, -0.86588, 0.86588, 1.4997, -0.4999, -0.4999, -0.4999]
    np.testing.assert_allclose(advantages, expected, atol=1e-4)
    np.testing.assert_allclose(group_advantages(rewards, group, 2, "none"), [0.5, -0.5, -0.5, 0.5, 0.75] + [-0.25] * 3)
    batch = group_advantages(rewards, group, 2, "batch")
    deviation = math.sqrt((3 * 0.625**2 + 5 * 0.375**2) / 7)  # of all eight rewards, whose mean is 3/8
    np.testing.assert_allclose(batch, group_advantages(rewards, group, 2, "none") / (deviation + 1e-4), rtol=1e-6)


def test_groups_need_not_be_contiguous():
    rewards, group = np.array([1.0, 5, 0, 2, 0, 5]), np.array([0, 0, 0, 1, 1, 1])
    order = np.array([3, 0, 4, 1, 5, 2])
    for scale in ("group", "batch", "none"):
        expected = group_advantages(rewards, group, 2, scale)[order]
        np.testing.assert_allclose(group_advantages(rewards[order], group[order], 2, scale), expected, rtol=1e-6)
    np.testing.assert_allclose(
        group_advantages(jnp.array(rewards), jnp.array(group), 2), group_advantages(rewards, group, 2)
    )


def test_rewards_that_do_not_apply():
    nan = np.nan
    #                   a NaN among others    one valid   none valid  equal rewards
    rewards = np.array([1.0, nan, 0.0, 0.0] + [3.0, nan] + [nan, nan] + [0.1] * 3)
    group = np.array([0] * 4 + [1] * 2 + [2] * 2 + [3] * 3)
    for scale in ("group", "batch", "none"):
        advantages = group_advantages(rewards, group, 4, scale)
        assert advantages[1] == 0
        np.testing.assert_array_equal(advantages[4:], 0)  # exactly: no rounding of 0.1 divided by eps
        assert np.isfinite(advantages).all()
    without = group_advantages(np.array([1.0, 0, 0]), np.zeros(3, int), 1)
    np.testing.assert_allclose(group_advantages(rewards, group, 4)[[0, 2, 3]], without)
    np.testing.assert_array_equal(leave_one_out_advantages(rewards, group, 4)[[1, 4, 5, 6, 7, 8, 9, 10]], 0)
    np.testing.assert_allclose(leave_one_out_advantages(rewards, group, 4)[[0, 2, 3]], [1, -0.5, -0.5])
    assert frac_reward_zero_std(rewards, group, 4) == 0.75


def test_leave_one_out_by_hand():
    advantages = leave_one_out_advantages(np.arange(1.0, 7.0), np.array([0, 0, 0, 1, 1, 1]), 2)
    np.testing.assert_allclose(advantages, [-1.5, 0, 1.5, -1.5, 0, 1.5])


def test_advantages_of_nonsense():
    rewards, group = np.array([0.0, 1.0]), np.array([0, 0])
    with pytest.raises(ValueError, match="row 1 is infinite"):
        group_advantages(np.array([0.0, np.inf]), group, 1)
    with pytest.raises(ValueError, match="num_groups is 1"):
        group_advantages(rewards, np.array([0, 1]), 1)
    with pytest.raises(ValueError, match="at least one group"):
        frac_reward_zero_std(rewards, group, 0)


#
# Losses: numbers that others have published or that are worked out by hand
#

ADVANTAGES = jnp.array([[1.0, -1.0, 2.0]])
OLD = jnp.full((1, 3), -1.0)
CURRENT = jnp.array([[-1.69315, -1.0, -0.59453]])  # ratios 0.5, 1, 1.5


def named(loss_type="dapo", epsilon=None, epsilon_high=None, delta=None, **kwargs):
    """Arguments of `policy_loss`, of the loss of a name with its options."""
    options = dict(epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)
    return dict(loss=make_policy_loss(loss_type, options)) | kwargs


def one_row(logprobs, old, advantages, **kwargs):
    mask = jnp.ones(logprobs.shape, bool)
    return policy_loss(logprobs, old, advantages, mask, normalizer=LossNormalizer.from_mask(mask), **named(**kwargs))


def share(metrics, name):
    """The number of tokens (of completions, at their level) that a metric counts."""
    return metrics.sums[name]


def test_clip_by_hand():
    loss, metrics = one_row(CURRENT, OLD, ADVANTAGES)
    assert loss == pytest.approx(-0.63333, abs=1e-4)
    tokens = [one_row(CURRENT[:, i : i + 1], OLD[:, :1], ADVANTAGES[:, i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(tokens, [-0.5, 1.0, -2.4], atol=1e-4)
    means = metrics.means()
    # The first ratio is below the range, but with a positive advantage it keeps its gradient.
    assert means["clip_ratio/low_mean"] == 0
    assert means["clip_ratio/high_mean"] == pytest.approx(1 / 3)
    assert means["clip_ratio/region_mean"] == pytest.approx(1 / 3)
    assert means["log_ratio/abs_max"] == pytest.approx(0.69315, abs=1e-5)
    assert means["log_ratio/abs_mean"] == pytest.approx((0.69315 + 0.40547) / 3, abs=1e-5)
    assert "kl" not in means
    low = one_row(CURRENT, OLD, -ADVANTAGES)[1].means()
    assert low["clip_ratio/low_mean"] == pytest.approx(1 / 3) and low["clip_ratio/high_mean"] == 0


def test_clipped_tokens_have_no_gradient():
    gradient = jax.grad(lambda x: one_row(x, OLD, ADVANTAGES)[0])(CURRENT)
    # -r A / 3 where not clipped
    np.testing.assert_allclose(gradient, [[-0.5 / 3, 1 / 3, 0]], atol=1e-5)


def test_asymmetric_clip():
    loss, metrics = one_row(CURRENT, OLD, ADVANTAGES, epsilon=0.2, epsilon_high=0.28)
    assert loss == pytest.approx((-0.5 + 1 - 2.56) / 3, abs=1e-4)
    assert share(metrics, "clip_ratio/high_mean") == 1
    assert share(one_row(CURRENT, OLD, ADVANTAGES, epsilon_high=0.6)[1], "clip_ratio/high_mean") == 0


def test_forced_on_policy():
    loss, gradient = jax.value_and_grad(lambda x: one_row(x, None, ADVANTAGES)[0])(CURRENT)
    assert loss == pytest.approx(-0.66667, abs=1e-4)
    np.testing.assert_allclose(gradient, -ADVANTAGES / 3, rtol=1e-6)


def test_cispo():
    cispo = dict(loss_type="cispo", epsilon_high=5.0)
    loss, gradient = jax.value_and_grad(lambda x: one_row(x, OLD, ADVANTAGES, **cispo)[0])(CURRENT)
    assert loss == pytest.approx(0.5434, abs=1e-4)
    # The ratio is a constant weight.
    np.testing.assert_allclose(gradient, -jnp.array([[0.5, 1, 1.5]]) * ADVANTAGES / 3, atol=1e-5)
    # Unlike PPO's clip, the cap leaves a gradient.
    gradient = jax.grad(lambda x: one_row(x, OLD, ADVANTAGES, loss_type="cispo", epsilon_high=1.2)[0])(CURRENT)
    np.testing.assert_allclose(gradient[0, 2], -1.2 * 2 / 3, atol=1e-5)
    # Without a ratio it is REINFORCE.
    reinforce, _ = one_row(jnp.array([[-0.5, -1.0, -1.5]]), None, ADVANTAGES, **cispo)
    assert reinforce == pytest.approx(0.8333, abs=1e-4)
    metrics = one_row(CURRENT, OLD, ADVANTAGES, loss_type="cispo", epsilon_high=1.2)[1]
    assert metrics.sums == {"cispo_clip_ratio": 1}


def test_delta():
    five = jnp.array([[math.log(5.0)]])
    zero, minus = jnp.zeros((1, 1)), jnp.array([-1.0])
    assert one_row(five, zero, minus)[0] == pytest.approx(5, rel=1e-5)
    assert one_row(five, zero, minus, delta=4.0)[0] == pytest.approx(4, rel=1e-5)
    # Dual clip with c=3: [-0.5, 1, min(40, 12)]
    logprobs, old = jnp.array([[-1.69315, -1.0, -0.69741]]), jnp.array([[-1.0, -1.0, -3.0]])
    loss, _ = one_row(logprobs, old, jnp.array([[1.0, -1.0, -4.0]]), delta=3.0)
    assert loss == pytest.approx(4.1667, abs=1e-4)


def test_sequence_level():
    loss, metrics = one_row(CURRENT, OLD, ADVANTAGES, importance_sampling_level="sequence", loss_type="grpo")
    ratio = math.exp((math.log(0.5) + math.log(1.5)) / 3)
    assert ratio == pytest.approx(0.9086, abs=1e-4)
    assert loss == pytest.approx(-0.6057, abs=1e-4)
    assert metrics.weight == 1  # a sequence, not three tokens
    # -A s for one advantage, and each token's gradient is -A s / length.
    advantage = jnp.array([2.0])
    args = dict(importance_sampling_level="sequence", loss_type="grpo")
    gradient = jax.grad(lambda x: one_row(x, OLD, advantage, **args)[0])(CURRENT)
    np.testing.assert_allclose(gradient, jnp.full((1, 3), -2 * ratio / 3), atol=1e-5)
    clipped = one_row(CURRENT, OLD, -advantage, epsilon=3e-4, epsilon_high=4e-4, **args)
    assert clipped[0] == pytest.approx(2 * (1 - 3e-4), abs=1e-5)
    assert share(clipped[1], "clip_ratio/low_mean") == pytest.approx(1)


def test_kl_estimators():
    logprobs, reference = jnp.full(3, -1.0), jnp.array([0.0, -15.0, -30.0])
    np.testing.assert_allclose(kl_k1(logprobs, reference), [-1, 14, 29])
    np.testing.assert_allclose(kl_k2(logprobs, reference), [0.5, 98, 420.5])
    np.testing.assert_allclose(kl_k3(logprobs, reference), [0.7183, 13, 28], atol=1e-4)
    k3 = kl_k3(jnp.array([0.0, -1.0, -2.0]), jnp.full(3, -1.0))
    np.testing.assert_allclose(k3, [0.3679, 0, 0.7183], atol=1e-4)
    small = kl_k3(jnp.array(-1.0 + 2**-12), jnp.array(-1.0))
    assert small == pytest.approx(2**-25, rel=0.02)  # d^2 / 2, though float32 cannot hold 1 + 2^-25


def test_kl_penalty():
    logprobs, reference = jnp.array([[0.0, -1.0, -2.0]]), jnp.full((1, 3), -1.0)
    plain, _ = one_row(logprobs, OLD, ADVANTAGES)
    plainly = dict(reference_logprobs=reference, use_bias_correction_kl=False)
    loss, metrics = one_row(logprobs, OLD, ADVANTAGES, beta=0.5, **plainly)
    assert loss - plain == pytest.approx(0.5 * 0.3621, abs=1e-4)
    assert metrics.means()["kl"] == pytest.approx(0.3621, abs=1e-4)
    only_kl = lambda x: one_row(x, OLD, 0 * ADVANTAGES, beta=1.0, **plainly)[0]
    np.testing.assert_allclose(jax.grad(only_kl)(logprobs), [[(1 - math.exp(-1)) / 3, 0, (1 - math.e) / 3]], atol=1e-5)


def test_aggregation_by_hand():
    losses, mask = jnp.array([[1.0, 9, 9], [2, 2, 2]]), jnp.array([[1, 0, 0], [1, 1, 1]], bool)
    normalizer = LossNormalizer.from_mask(mask, max_completion_length=4)
    expected = {"grpo": 1.5, "dapo": 1.75, "cispo": 1.75, "bnpo": 1.75, "dr_grpo": 0.875}
    for loss_type, value in expected.items():
        assert make_policy_loss(loss_type).average(losses, mask, normalizer) == pytest.approx(value)


def test_sequence_mean_by_hand():
    mask = jnp.array([[1, 1, 1], [1, 0, 0]], bool)
    logprobs = jnp.full((2, 3), -2.0)
    normalizer = LossNormalizer.from_mask(mask)
    loss, _ = policy_loss(logprobs, logprobs, jnp.array([1.5, 3.0]), mask, normalizer=normalizer, **named("grpo"))
    assert loss == pytest.approx(-2.25)


def test_accumulation_trap():
    losses = jnp.array([[0.5] * 3 + [7], [1] + [7] * 3, [2] * 4, [1.5] * 2 + [7] * 2])
    mask = losses != 7
    normalizer = LossNormalizer.from_mask(mask, num_micro_batches=2)
    halves = lambda loss_type: [
        make_policy_loss(loss_type).average(losses[i : i + 2], mask[i : i + 2], normalizer) for i in (0, 2)
    ]
    assert sum(halves("dapo")) == pytest.approx(1.35)
    assert sum(halves("bnpo")) == pytest.approx(1.2292, abs=1e-4)  # the mean of means, which is what bnpo is


#
# Losses: properties
#


def batch_of(key, rows=6, new=5):
    keys = jr.split(key, 4)
    logprobs = -jr.exponential(keys[0], (rows, new))
    old = logprobs + 0.4 * jr.normal(keys[1], (rows, new))
    reference = logprobs + 0.4 * jr.normal(keys[2], (rows, new))
    advantages = jr.normal(keys[3], (rows,))
    lengths = jnp.arange(rows) % (new + 1)  # an empty row among them
    return logprobs, old, reference, advantages, jnp.arange(new)[None, :] < lengths[:, None]


VARIANTS = [
    dict(loss_type="dapo"),
    dict(loss_type="grpo", importance_sampling_level="sequence"),
    dict(loss_type="dr_grpo", delta=1.5),
    dict(loss_type="cispo", epsilon_high=1.1),
    dict(loss_type="bnpo"),
]


def make_run(variant, with_reference=True):
    @jax.jit
    def run(logprobs, old, reference, advantages, mask, normalizer):
        def loss(logprobs):
            kl = dict(beta=0.1, reference_logprobs=reference) if with_reference else {}
            return policy_loss(logprobs, old, advantages, mask, normalizer=normalizer, **kl, **named(**variant))

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
        return value, gradient, metrics

    return run


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant["loss_type"])
def test_losses_accumulate_and_ignore_padding(variant, getkey):
    batch = batch_of(getkey())
    mask = batch[-1]
    run = make_run(variant)
    normalizer = LossNormalizer.from_mask(mask, 8)
    value, gradient, metrics = run(*batch, normalizer)
    assert jnp.isfinite(value) and jnp.abs(gradient).max() > 0
    assert (jnp.where(mask, 0, gradient) == 0).all()

    # Whatever lies where the mask is False changes nothing, not a bit.
    for garbage in (jnp.nan, jnp.inf, -jnp.inf, 1e4):
        spoiled = [jnp.where(mask, x, garbage) for x in batch[:3]]
        advantages = jnp.where(mask.any(1), batch[3], garbage)
        for clean, dirty in zip(
            jax.tree.leaves((value, gradient, metrics)),
            jax.tree.leaves(run(*spoiled, advantages, mask, normalizer)),
            strict=True,
        ):
            np.testing.assert_array_equal(clean, dirty)

    # The sum over micro-batches is the whole batch, except for bnpo, by its definition.
    if variant["loss_type"] != "bnpo":
        parts = [run(*(x[i : i + 2] for x in batch), normalizer) for i in (0, 2, 4)]
        np.testing.assert_allclose(sum(part[0] for part in parts), value, rtol=1e-5)
        np.testing.assert_allclose(jnp.concatenate([part[1] for part in parts]), gradient, rtol=1e-5, atol=1e-7)
        total = functools.reduce(operator.add, (part[2] for part in parts))
        for name, expected in metrics.means().items():
            assert total.means()[name] == pytest.approx(float(expected), rel=1e-5), name

    # Nothing to learn from.
    empty = jnp.zeros_like(mask)
    value, gradient, metrics = run(*batch[:4], empty, LossNormalizer.from_mask(empty))
    assert value == 0 and (gradient == 0).all()
    assert all(mean == 0 for mean in metrics.means().values())


def test_padding_is_ignored_without_jit():
    """XLA turns a product with a mask into a selection; so only here does it show which of the two is written."""
    mask = jnp.array([[True, True, False]])
    spoil = lambda x: jnp.where(mask, x, jnp.nan)
    loss = lambda x: policy_loss(
        x,
        spoil(OLD),
        spoil(ADVANTAGES),
        mask,
        normalizer=LossNormalizer.from_mask(mask),
        beta=0.1,
        reference_logprobs=x,
    )
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(spoil(CURRENT))
    assert value == pytest.approx(0.25, abs=1e-4)
    np.testing.assert_allclose(gradient, [[-0.25, 0.5, 0]], atol=1e-4)
    assert all(jnp.isfinite(mean) for mean in metrics.means().values())


def test_bnpo_undivided_is_dapo(getkey):
    logprobs, old, _, advantages, mask = batch_of(getkey())
    normalizer = LossNormalizer.from_mask(mask)
    dapo, bnpo = (
        policy_loss(logprobs, old, advantages, mask, normalizer=normalizer, **named(loss_type))[0]
        for loss_type in ("dapo", "bnpo")
    )
    assert dapo == pytest.approx(float(bnpo), rel=1e-6)


def test_rows_that_pad_a_micro_batch_do_not_count(getkey):
    """Five rows in micro-batches of three: with `num_rows=5` the sixth, empty, has no weight."""
    batch = batch_of(getkey(), rows=5)
    padded = [jnp.pad(x, ((0, 1),) + ((0, 0),) * (x.ndim - 1)) for x in batch]
    run = make_run(dict(loss_type="grpo"))
    expected = run(*batch, LossNormalizer.from_mask(batch[-1]))[0]
    value = run(*padded, LossNormalizer.from_mask(padded[-1], num_rows=5))[0]
    assert value == pytest.approx(float(expected), rel=1e-6)


def test_extreme_ratios_stay_finite():
    logprobs, old = jnp.array([[-1.0, -300.0]]), jnp.array([[-300.0, -1.0]])
    for advantage in (1.0, -1.0):
        loss = lambda x, a=advantage: one_row(x, old, jnp.array([a]))[0]
        value, gradient = jax.value_and_grad(loss)(logprobs)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_schedules_do_not_recompile(getkey):
    logprobs, old, reference, advantages, mask = batch_of(getkey())
    traces = []

    @jax.jit
    def run(epsilon, epsilon_high, delta, beta, normalizer):
        traces.append(None)
        kwargs = dict(loss=DAPO(epsilon, epsilon_high, delta), beta=beta, reference_logprobs=reference)
        return policy_loss(logprobs, old, advantages, mask, normalizer=normalizer, **kwargs)[0]

    values = {
        float(run(*jnp.array([0.2, 0.2, 2.0, beta]), LossNormalizer(tokens, 6, 5)))
        for beta in (0, 1)
        for tokens in (7, 9)
    }
    assert len(traces) == 1 and len(values) == 4


def test_policy_loss_of_nonsense():
    with pytest.raises(ValueError, match="there is no loss_type 'cipso'. Did you mean 'cispo'"):
        one_row(CURRENT, OLD, ADVANTAGES, loss_type="cipso")
    with pytest.raises(ValueError, match="'token', but LUSPO is made for 'sequence'"):
        one_row(CURRENT, OLD, ADVANTAGES, loss_type="luspo")
    with pytest.raises(ValueError, match="beta is 0.1, but reference_logprobs is None"):
        one_row(CURRENT, OLD, ADVANTAGES, beta=0.1)
    zero = jnp.float32(0.0)
    with pytest.raises(ValueError, match="a KL"):
        PolicyLossMetrics(zero, zero, {}, zero, zero, zero) + PolicyLossMetrics(zero, zero, {}, zero, zero)


#
# Log-probabilities in chunks
#


def test_next_token_positions():
    positions = next_token_positions(jnp.array([1, 4]), 3)
    np.testing.assert_array_equal(positions, [[0, 1, 2], [3, 4, 5]])
    # A "model" whose hidden state at i is the token at i + 1: the completion comes out.
    sequences = jnp.array([[10, 11, 12, 13, 0, 0, 0], [20, 21, 22, 23, 24, 25, 26]])
    hidden = jnp.roll(sequences, -1, axis=1)
    completions = jnp.take_along_axis(hidden, positions, axis=1)
    np.testing.assert_array_equal(completions, [[11, 12, 13], [24, 25, 26]])


POSITIONS, HIDDEN, VOCAB, CHUNK = 23, 6, 41, 5


def dense_logprobs(hidden, tokens, unembed, temperature):
    logprobs = jax.nn.log_softmax(unembed(hidden).astype(jnp.float32) / temperature)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def chunked_case(getkey):
    hidden = jr.normal(getkey(), (POSITIONS, HIDDEN))
    weight = jr.normal(getkey(), (HIDDEN, VOCAB))
    tokens = jr.randint(getkey(), (POSITIONS,), 0, VOCAB)
    cotangents = jr.normal(getkey(), (2, POSITIONS))
    return hidden, weight, tokens, cotangents


@pytest.mark.parametrize("chunk", [1, CHUNK, POSITIONS, 100])
def test_chunked_is_dense(chunk, getkey):
    hidden, weight, tokens, cotangents = chunked_case(getkey)

    def total(function, hidden, weight, temperature):
        logprobs, entropies = function(hidden, tokens, lambda h: h @ weight, temperature)
        return (logprobs * cotangents[0] + entropies * cotangents[1]).sum(), (logprobs, entropies)

    def chunked(*args):
        return chunked_logprobs(*args, chunk, differentiable_entropy=True)

    run = jax.jit(jax.value_and_grad(total, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    args = hidden, weight, jnp.array(0.7)
    for got, expected in zip(
        jax.tree.leaves(run(chunked, *args)), jax.tree.leaves(run(dense_logprobs, *args)), strict=True
    ):
        assert got.shape == expected.shape and got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, CHUNK, CHUNK + 1])
def test_chunks_beyond_the_count_are_left_out(count, getkey):
    hidden, weight, tokens, _ = chunked_case(getkey)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def total(hidden, weight, count):
        logprobs, entropies = chunked_logprobs(hidden, tokens, lambda h: h @ weight, 1.0, CHUNK, count=count)
        return jnp.sum(jnp.where(jnp.arange(len(tokens)) < count, logprobs, 0.0)), (logprobs, entropies)

    (_, (logprobs, entropies)), gradients = total(hidden, weight, count)
    dense, dense_entropies = dense_logprobs(hidden, tokens, lambda h: h @ weight, 1.0)
    computed = -(-count // CHUNK) * CHUNK
    np.testing.assert_allclose(logprobs[:count], dense[:count], rtol=1e-5)
    np.testing.assert_allclose(entropies[:count], dense_entropies[:count], rtol=1e-5)
    assert not logprobs[computed:].any() and not entropies[computed:].any()
    wanted = jax.grad(lambda *a: dense_logprobs(a[0], tokens, lambda h: h @ a[1], 1.0)[0][:count].sum(), (0, 1))
    for found, expected in zip(gradients, wanted(hidden, weight), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_entropy_is_a_metric_by_default(getkey):
    hidden, weight, tokens, _ = chunked_case(getkey)
    entropy = lambda h: chunked_logprobs(h, tokens, lambda h: h @ weight, 1.0, CHUNK)[1].sum()
    value, gradient = jax.value_and_grad(entropy)(hidden)
    assert value == pytest.approx(float(dense_logprobs(hidden, tokens, lambda h: h @ weight, 1.0)[1].sum()), rel=1e-5)
    assert (gradient == 0).all()


def test_entropy_of_ruled_out_tokens(getkey):
    hidden, weight, tokens, _ = chunked_case(getkey)
    half = lambda h: (h @ weight).at[:, : VOCAB // 2].set(-jnp.inf)
    total = lambda h: chunked_logprobs(h, tokens, half, 1.0, CHUNK, differentiable_entropy=True)[1].sum()
    value, gradient = jax.value_and_grad(total)(hidden)
    rest = dense_logprobs(hidden, tokens * 0, lambda h: h @ weight[:, VOCAB // 2 :], 1.0)[1].sum()
    assert value == pytest.approx(float(rest), rel=1e-5)
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 0


def test_no_positions_and_no_chunk(getkey):
    hidden, weight, tokens, _ = chunked_case(getkey)
    logprobs, entropies = chunked_logprobs(hidden[:0], tokens[:0], lambda h: h @ weight, 1.0, CHUNK)
    assert logprobs.shape == entropies.shape == (0,)
    with pytest.raises(ValueError, match="chunk is 0"):
        chunked_logprobs(hidden, tokens, lambda h: h @ weight, 1.0, 0)


def shapes_in(jaxpr):
    """The shapes of all values in a jaxpr and in those within it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, jax_core.Jaxpr | jax_core.ClosedJaxpr)
        ):
            if isinstance(parameter, jax_core.ClosedJaxpr):
                parameter = parameter.jaxpr
            if isinstance(parameter, jax_core.Jaxpr):
                yield from shapes_in(parameter)


def test_no_array_of_positions_and_vocab_exists(getkey):
    hidden, weight, tokens, cotangents = chunked_case(getkey)

    def largest_with_vocab(function):
        def total(hidden, weight):
            logprobs, entropies = function(hidden, tokens, lambda h: h @ weight, 0.7)
            return (logprobs * cotangents[0] + entropies * cotangents[1]).sum()

        jaxpr = jax.make_jaxpr(jax.value_and_grad(total, argnums=(0, 1)))(hidden, weight).jaxpr
        return max(math.prod(shape) for shape in shapes_in(jaxpr) if VOCAB in shape)

    for differentiable_entropy in (False, True):
        chunked = lambda *args, d=differentiable_entropy: chunked_logprobs(*args, CHUNK, differentiable_entropy=d)
        # The weight's gradient is the largest; a chunk of logits comes next.
        assert largest_with_vocab(chunked) == max(HIDDEN, CHUNK) * VOCAB
        # Nor is the weight kept once for every chunk, as it is where a branch is differentiated within a scan.
        counted = lambda *args, f=chunked_logprobs, d=differentiable_entropy: f(
            *args, CHUNK, differentiable_entropy=d, count=jnp.array(CHUNK + 1)
        )
        assert largest_with_vocab(counted) == max(HIDDEN, CHUNK) * VOCAB
    assert largest_with_vocab(dense_logprobs) == POSITIONS * VOCAB  # or the test could not fail
