"""Every loss, and the terms beside it: values of others, gradients by hand, and what must not change any of them."""

import functools
import math
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from loss_cases import ADVANTAGES, ALL, CASES, CURRENT, OLD, kl, one_row, table, value, weights

from eqx_specgrpo.config import check_resume, dump_config, load_config
from eqx_specgrpo.errors import ConfigError, UserError
from eqx_specgrpo.grpo import (
    POLICY_LOSSES,
    AdaptiveEntropyCoef,
    FixedEntropyCoef,
    LossNormalizer,
    correction_metrics,
    group_advantages,
    high_entropy_mask,
    make_policy_loss,
    max_rl_advantages,
    normalize_then_sum_advantages,
    pass_at_k,
    pass_at_k_advantages,
    policy_loss,
)
from eqx_specgrpo.grpo.losses import binary_kl, options_of

RATIOS = jnp.array([[0.5, 1.0, 1.5]])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_value(case):
    np.testing.assert_allclose(np.ravel(case.ours()), np.ravel(case.theirs), atol=1.01e-4)


def test_the_documented_table_is_what_comes_out():
    """As the page prints them: theirs beside ours. To write it anew: python tests/loss_cases.py."""
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    assert table() in page


#
# Gradients by hand: what is a constant weight, and what is not
#


def gradient(logprobs=CURRENT, **kwargs):
    return jax.grad(lambda x: value(x, **kwargs))(logprobs)


def test_ratios_are_constant_weights_where_the_papers_have_them_so():
    phi = np.array([[1.1908, 0.6956, 1.1908]])  # one weight a completion, by the sign of the advantage
    vespo = gradient(loss_type="vespo")
    np.testing.assert_allclose(vespo, -phi * ADVANTAGES / 3, atol=1e-4)
    assert value(loss_type="vespo") == pytest.approx(float(-(phi * ADVANTAGES * CURRENT).sum() / 3), abs=1e-4)
    # A token inside of the trust region has the gradient of the ratio, one outside has none.
    np.testing.assert_allclose(gradient(loss_type="dppo_tv"), -RATIOS * ADVANTAGES / 3, atol=1e-5)
    outside = gradient(loss_type="dppo_tv", options={"dppo_delta": 0.18})
    np.testing.assert_allclose(outside, [[-0.5 / 3, 1 / 3, 0]], atol=1e-5)
    # The other direction has a bound of its own, and only what the advantage pushes on is outside.
    lower = dict(loss_type="dppo_tv", advantages=-ADVANTAGES)
    np.testing.assert_allclose(gradient(**lower, options={"dppo_delta": 0.18})[0, 0], 0)
    kept = gradient(**lower, options={"dppo_delta": 0.19, "dppo_delta_high": 0.01})
    np.testing.assert_allclose(kept, [[0.5 / 3, -1 / 3, 3 / 3]], atol=1e-5)


def test_dppo_kl_is_outside_only_where_the_advantage_pushes():
    # All KLs above the bound but the second's, which is 0.
    of = lambda advantages: gradient(loss_type="dppo_kl", advantages=advantages, options={"dppo_delta": 0.01})
    np.testing.assert_allclose(of(ADVANTAGES), [[-0.5 / 3, 1 / 3, 0]], atol=1e-5)
    np.testing.assert_allclose(of(-ADVANTAGES), [[0, -1 / 3, 3 / 3]], atol=1e-5)


def test_binary_kl_of_certainties():
    """0 log 0 is 0; from a token that was not certain to one that is, it is far but finite."""
    old, new = jnp.array([0.0, 0.0, -1.0]), jnp.array([0.0, -1.0, 0.0])
    same, left, certain = binary_kl(old, new)
    assert (same, left) == (0.0, 1.0) and 10 < certain < 1e3


def test_slope_of_the_soft_gate():
    slope = lambda ratio, t: 4 * jax.nn.sigmoid(t * (ratio - 1)) * jax.nn.sigmoid(-t * (ratio - 1))
    expected = -jnp.array([[slope(0.5, 1.0) * 0.5, slope(1.0, 1.05), slope(1.5, 1.0) * 1.5]]) * ADVANTAGES / 3
    np.testing.assert_allclose(gradient(loss_type="sapo"), expected, atol=1e-5)
    sharper = gradient(loss_type="sapo", options={"sapo_temperature_pos": 5.0})
    np.testing.assert_allclose(sharper[0, 1], expected[0, 1], atol=1e-5)
    assert abs(sharper[0, 2]) < abs(expected[0, 2])


def test_luspo_weighs_a_completion_by_its_length():
    mask = jnp.array([[1, 1, 1], [1, 0, 0]], bool)
    logprobs = jnp.full((2, 3), -2.0)
    loss, normalizer = make_policy_loss("luspo"), LossNormalizer.from_mask(mask)
    total, metrics = policy_loss(
        logprobs, logprobs, jnp.array([1.5, 3.0]), mask, loss=loss, normalizer=normalizer,
        importance_sampling_level="sequence",
    )  # fmt: skip
    assert total == pytest.approx(-(3 * 1.5 + 1 * 3.0) / 2)
    assert metrics.weight == 2


#
# The KL
#


def exact_kl(logits, reference):
    logprobs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logprobs) * (logprobs - reference))


@pytest.mark.parametrize("on_policy", [True, False])
def test_gradients_of_kl_estimators_in_expectation(on_policy):
    """Over all tokens that a sampler may draw: k1 and k3 with the ratio are right for any sampler, k2 without it for
    the policy's own samples; k1 without it has no gradient at all."""
    logits, reference = jnp.array([0.3, -1.0, 1.2, 0.1]), jax.nn.log_softmax(jnp.array([1.0, 0.5, -0.5, 0.0]))
    sampler = jax.nn.log_softmax(logits if on_policy else jnp.array([-0.2, 0.4, 0.9, 0.0]))
    right = jax.grad(exact_kl)(logits, reference)

    def expected(name, with_ratio):
        def loss(logits):
            mask = jnp.ones((1, 4), bool)
            total, _ = policy_loss(
                jax.nn.log_softmax(logits)[None], sampler[None], jnp.zeros(1), mask,
                normalizer=LossNormalizer.from_mask(mask), beta=1.0, reference_logprobs=reference[None],
                kl_estimator=name, use_bias_correction_kl=with_ratio, importance_weights=None,
            )  # fmt: skip
            return total

        # The gradient of each token's term, weighted by how often the sampler draws it.
        def weighted(logits):
            logprobs = jax.nn.log_softmax(logits)
            term = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: jnp.exp(-d) + d - 1}[name]
            ratio = jnp.exp(logprobs - sampler) if with_ratio else 1.0
            return jnp.sum(jnp.exp(sampler) * ratio * term(logprobs - reference))

        # `policy_loss` gives a quarter of the sum over tokens; so each token's own gradient, times its probability.
        tokens = jax.jacobian(
            lambda logits: jnp.stack([
                policy_loss(
                    jax.nn.log_softmax(logits)[None, i : i + 1], sampler[None, i : i + 1], jnp.zeros(1),
                    jnp.ones((1, 1), bool), normalizer=LossNormalizer(1, 1, 1), beta=1.0,
                    reference_logprobs=reference[None, i : i + 1], kl_estimator=name,
                    use_bias_correction_kl=with_ratio,
                )[0]
                for i in range(4)
            ])
        )(logits)  # fmt: skip
        ours = jnp.exp(sampler) @ tokens
        np.testing.assert_allclose(ours, jax.grad(weighted)(logits), atol=1e-6)
        np.testing.assert_allclose(jax.grad(loss)(logits), tokens.mean(0), atol=1e-6)
        return ours

    for name in ("k1", "k3"):
        np.testing.assert_allclose(expected(name, True), right, atol=1e-6)
    assert np.abs(expected("k3", False) - right).max() > 0.01
    if on_policy:
        np.testing.assert_allclose(expected("k2", False), right, atol=1e-6)
        np.testing.assert_allclose(expected("k1", False), 0, atol=1e-6)
    else:
        assert np.abs(expected("k2", False) - right).max() > 0.01


def test_kl_with_the_ratio_is_that_of_trl():
    """TRL 1.16: `(exp(ref - new) - (ref - new) - 1) * exp(new - old)`, nothing detached."""
    reference, none = jnp.array([[-0.3, -2.0, -1.0]]), jnp.zeros((1, 3))

    def theirs(logprobs):
        gap = reference - logprobs
        return 0.5 * jnp.mean((jnp.exp(gap) - gap - 1) * jnp.exp(logprobs - OLD))

    ours = functools.partial(value, advantages=none, beta=0.5, reference_logprobs=reference)
    np.testing.assert_allclose(ours(CURRENT), theirs(CURRENT), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(CURRENT), jax.grad(theirs)(CURRENT), rtol=1e-4, atol=1e-7)
    without = jax.grad(lambda x: ours(x, use_bias_correction_kl=False))(CURRENT)
    assert np.abs(without - jax.grad(theirs)(CURRENT)).max() > 0.01
    # One ratio a completion at the level of sequences.
    sequence = ours(CURRENT, loss_type="grpo", importance_sampling_level="sequence")
    k3 = kl("k3", CURRENT[0], reference[0])
    assert sequence == pytest.approx(float(0.5 * 0.9086 * k3.mean()), rel=1e-3)


def test_kl_stays_finite():
    far, gradient = jax.value_and_grad(lambda x: kl("k3", [x], [-1.0])[0])(-150.0)
    assert jnp.isfinite(far) and jnp.isfinite(gradient)


#
# Masks, weights and the entropy bonus
#


def test_off_policy_completions_with_a_negative_advantage_are_left_out():
    drift = float((OLD - CURRENT).mean())
    assert drift == pytest.approx(0.0959, abs=1e-4)
    for advantage, threshold, left_out in ((-1.0, 0.09, 1), (-1.0, 0.1, 0), (1.0, 0.09, 0)):
        loss, metrics = one_row(advantages=jnp.full((1, 3), advantage), off_policy_mask_threshold=threshold)
        assert metrics.means()["off_policy/masked_mean"] == left_out
        assert (loss == 0) == bool(left_out)
    # What counts is the sampler's probability, where that is another one.
    loss, _ = one_row(advantages=-jnp.ones((1, 3)), off_policy_mask_threshold=0.5, sampling_logprobs=CURRENT + 0.6)
    assert loss == 0


def test_correction_by_hand():
    sequence = math.exp(-0.5 + 0.5 - 0.2)
    assert weights("sequence_truncate", None, 0.8)[0, 0] == pytest.approx(0.8)
    np.testing.assert_allclose(weights("sequence_truncate", 0.9, None), 0.9, rtol=1e-6)
    np.testing.assert_allclose(weights("sequence_mask", None, 3.0), sequence, rtol=1e-6)
    np.testing.assert_array_equal(weights("sequence_mask", None, 0.8), 0)
    np.testing.assert_array_equal(weights("sequence_mask", 0.9, None), 0)
    np.testing.assert_allclose(weights("token_truncate", 0.7, 1.0), [[0.7, 1.0, math.exp(-0.2)]], rtol=1e-6)
    np.testing.assert_allclose(weights("token_mask", 0.7, 1.0), [[0.0, 0.0, math.exp(-0.2)]], rtol=1e-6)
    equal = weights("sequence_mask", None, 3.0, np.asarray(OLD))
    np.testing.assert_array_equal(equal, 1)
    token = correction_metrics(weights("token_truncate", None, None), ALL, "token_truncate")
    assert list(token.values()) == pytest.approx([math.exp(-0.5), 1.02464, math.exp(0.5)], rel=1e-4)
    of_sequence = correction_metrics(weights("sequence_truncate", None, None), ALL, "sequence_truncate")
    assert list(of_sequence.values()) == pytest.approx([sequence] * 3)
    assert set(correction_metrics(np.ones((1, 3), np.float32), ~ALL, "token_mask").values()) == {0.0}


def test_vespo_takes_the_correction_into_its_own_weight():
    correction = jnp.asarray(weights("token_truncate", None, None))
    plain, corrected = (value(loss_type="vespo", importance_weights=x) for x in (None, correction))
    log_weight = math.log(0.75) - 0.2
    phi = lambda k, decay: math.exp(decay + k * log_weight - decay * math.exp(log_weight))
    expected = -(jnp.array([[phi(2, 3), phi(3, 2), phi(2, 3)]]) * ADVANTAGES * CURRENT).sum() / 3
    assert corrected == pytest.approx(float(expected), rel=1e-4) and corrected != pytest.approx(float(plain), rel=1e-2)
    # A masked token takes its completion out.
    assert value(loss_type="vespo", importance_weights=jnp.array([[1.0, 0.0, 1.0]])) == pytest.approx(0, abs=1e-6)


def test_tokens_of_high_entropy():
    entropies = np.array([[0.1, 0.9, 0.5, 99.0], [0.3, 2.0, 0.7, 1.1]], np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    for share in (0.0, 0.2, 0.37, 0.5, 1.0):
        threshold = float(torch.quantile(torch.tensor(entropies[mask]), 1 - share))
        np.testing.assert_array_equal(high_entropy_mask(entropies, mask, share), mask & (entropies >= threshold - 1e-7))
    assert high_entropy_mask(entropies, mask, 0.0).sum() == 1 and high_entropy_mask(entropies, mask, 1.0).sum() == 7
    assert not high_entropy_mask(entropies, ~(mask | True), 0.2).any()
    # The other tokens teach nothing, but still count in the mean.
    keep = jnp.array([[True, False, True]])
    assert value(entropy_mask=keep) == pytest.approx((-0.5 - 2.4) / 3, abs=1e-4)


def test_entropy_bonus_by_hand():
    entropies = jnp.array([[0.5, 1.0, 3.0]])
    bonus = lambda x, **kwargs: one_row(entropies=x, entropy_coef=0.1, **kwargs)
    for loss_type in ("dapo", "grpo", "dr_grpo", "cispo"):  # the same, however the loss is averaged
        plain = value(loss_type=loss_type)
        loss, metrics = bonus(entropies, loss_type=loss_type)
        assert loss - plain == pytest.approx(-0.15, abs=1e-6) and metrics.entropy_bonus == pytest.approx(1.5)
        slope = jax.grad(lambda x, t=loss_type: bonus(x, loss_type=t)[0])(entropies)
        np.testing.assert_allclose(slope, -0.1 / 3, rtol=1e-6)
    # Of the tokens that teach alone, and over their number.
    keep = jnp.array([[True, False, True]])
    normalizer = LossNormalizer.from_mask(ALL, entropy_mask=keep)
    _, metrics = policy_loss(
        CURRENT, OLD, ADVANTAGES, jnp.asarray(ALL), normalizer=normalizer, entropies=entropies, entropy_mask=keep
    )
    assert metrics.entropy_bonus == pytest.approx(1.75)


def test_adaptive_coefficient_by_hand():
    control = AdaptiveEntropyCoef(0.01, target=0.5, delta=0.004, lowest=0.0, highest=0.015)
    state = control.init()
    applied, stands = [], []
    for entropy in (0.4, 0.3, 0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.2, 0.2):
        applied.append(float(control.coefficient(state)))
        state = control.update(state, jnp.float32(entropy))
        stands.append(float(state.coef))
    # Nothing before an entropy is known, nothing after one above the target; kept within its bounds.
    np.testing.assert_allclose(applied, [0, 0.014, 0.015, 0.015, 0, 0, 0, 0, 0, 0.004], atol=1e-8)
    np.testing.assert_allclose(stands, [0.014, 0.015, 0.015, 0.011, 0.007, 0.003, 0, 0, 0.004, 0.008], atol=1e-8)
    fixed = FixedEntropyCoef(0.02)
    state = fixed.update(fixed.init(), jnp.float32(9.0))
    assert fixed.coefficient(state) == pytest.approx(0.02)


#
# What changes none of them
#


def a_batch(rows=6, new=5):
    keys = jr.split(jr.key(0), 6)
    logprobs = -jr.exponential(keys[0], (rows, new))
    near = lambda key: logprobs + 0.4 * jr.normal(key, (rows, new))
    mask = jnp.arange(new)[None, :] < (jnp.arange(rows) % (new + 1))[:, None]  # an empty row among them
    given = dict(
        reference_logprobs=near(keys[2]),
        sampling_logprobs=near(keys[5]),
        importance_weights=jnp.exp(0.3 * jr.normal(keys[4], (rows, new))),
        entropies=jr.exponential(keys[4], (rows, new)),
    )
    entropy_mask = jnp.asarray(high_entropy_mask(np.asarray(given["entropies"]), np.asarray(mask), 0.6))
    return logprobs, near(keys[1]), jr.normal(keys[3], (rows,)), mask, given | dict(entropy_mask=entropy_mask)


def everything(loss_type, batch, normalizer):
    """A loss with all that may stand beside it: value, gradients in log-probabilities and entropies, metrics."""
    logprobs, old, advantages, mask, given = batch
    loss = make_policy_loss(loss_type)

    def total(logprobs, entropies):
        return policy_loss(
            logprobs, old, advantages, mask, normalizer=normalizer, loss=loss, beta=0.1,
            importance_sampling_level=loss.traits.levels[0], off_policy_mask_threshold=0.1, entropy_coef=0.3,
            **(given | dict(entropies=entropies)),
        )  # fmt: skip

    (value, metrics), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(logprobs, given["entropies"])
    return value, gradients, metrics


def rows_of(batch, part):
    return (*(x[part] for x in batch[:4]), {name: x[part] for name, x in batch[4].items()})


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_accumulation_and_padding_change_nothing(loss_type):
    """Operation by operation: compiled as a whole, a product with a mask would pass for a selection."""
    batch = a_batch()
    mask = batch[3]
    normalizer = LossNormalizer.from_mask(mask, 8, num_micro_batches=3, entropy_mask=batch[4]["entropy_mask"])
    value, gradients, metrics = everything(loss_type, batch, normalizer)
    assert jnp.isfinite(value)
    for gradient in gradients:
        assert jnp.abs(gradient).max() > 0 and (jnp.where(mask, 0, gradient) == 0).all()

    # Whatever lies where the mask is False changes nothing, not a bit.
    for garbage in (jnp.nan, jnp.inf, -1e4):
        spoil = lambda x, g=garbage: jnp.where(mask, x, g) if x.dtype == jnp.float32 else x
        spoiled = (
            *(spoil(x) for x in batch[:2]),
            jnp.where(mask.any(1), batch[2], garbage),
            mask,
            {name: spoil(x) for name, x in batch[4].items()},
        )
        for clean, dirty in zip(
            jax.tree.leaves((value, gradients, metrics)),
            jax.tree.leaves(everything(loss_type, spoiled, normalizer)),
            strict=True,
        ):
            np.testing.assert_array_equal(clean, dirty)

    # The sum over micro-batches is the whole batch, except for bnpo, by its definition.
    parts = [everything(loss_type, rows_of(batch, slice(i, i + 2)), normalizer) for i in (0, 2, 4)]
    if POLICY_LOSSES[loss_type].traits.depends_on_micro_batches:
        assert abs(sum(part[0] for part in parts) - value) > 1e-3
        return
    np.testing.assert_allclose(sum(part[0] for part in parts), value, rtol=1e-5)
    for i, gradient in enumerate(gradients):
        np.testing.assert_allclose(jnp.concatenate([part[1][i] for part in parts]), gradient, rtol=1e-5, atol=1e-7)
    total = functools.reduce(operator.add, (part[2] for part in parts))
    np.testing.assert_allclose(total.entropy_bonus, metrics.entropy_bonus, rtol=1e-5)
    for name, expected in metrics.means().items():
        assert total.means()[name] == pytest.approx(float(expected), rel=1e-5), name


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_extreme_ratios_stay_finite(loss_type):
    loss = make_policy_loss(loss_type)
    logprobs, old = jnp.array([[0.0, -300.0, -1e-9]]), jnp.array([[-300.0, 0.0, 0.0]])
    for advantage in (1.0, -1.0):

        def total(x, a=advantage):
            return value(
                x, old, jnp.array([a]), loss_type, importance_sampling_level=loss.traits.levels[0], beta=0.1,
                reference_logprobs=old,
            )  # fmt: skip

        result, slope = jax.value_and_grad(total)(logprobs)
        assert jnp.isfinite(result) and jnp.isfinite(slope).all()


#
# Advantages
#


def test_max_rl_by_hand():
    rewards, group = np.array([1.0, 0, 0, 0, 1, 1, 0, 0, 0, 0]), np.array([0] * 4 + [1] * 4 + [2] * 2)
    advantages = max_rl_advantages(rewards, group, 3)
    np.testing.assert_allclose(advantages, [3, -1, -1, -1, 1, 1, -1, -1, 0, 0])  # a hard prompt weighs more
    with pytest.raises(UserError, match="a reward is -1, but max_rl divides"):
        max_rl_advantages(np.array([1.0, -1.0]), np.zeros(2, int), 1)


def test_pass_at_k_advantages_by_hand():
    group = np.array([0, 1, 0, 1, 0, 1, 1])
    rewards = np.array([0.5, 1.0, 2.0, 1.0, 0.75, 0.0, np.nan])
    unscaled = pass_at_k_advantages(rewards, group, 2, "none")
    np.testing.assert_allclose(unscaled, [0, 0, 1.25, 0, 0, 0, 0])  # the second group has two best
    deviation = np.std([0.5, 2.0, 0.75], ddof=1)
    np.testing.assert_allclose(pass_at_k_advantages(rewards, group, 2)[2], 1.25 / (deviation + 1e-4), rtol=1e-5)
    with pytest.raises(ValueError, match="k is 9: with 8 samples"):
        pass_at_k(8, 2, 9)


def test_normalize_then_sum_by_hand():
    """GDPO: a function whose rewards are a hundred times as large does not drown the other."""
    group = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    small, large = np.array([0.0, 1, 0, 1, 1, 1, 1, 1]), 100 * np.array([1.0, 1, 0, 0, 0, 0, 1, 1])
    rewards, shares = np.stack([small, large], 1), np.array([1.0, 2.0])
    each = np.stack([group_advantages(column, group, 2) for column in rewards.T], 1)
    total = each @ shares
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    found = normalize_then_sum_advantages(rewards, shares, group, 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[1] > found[0] > found[3] > found[2] and found.dtype == np.float32
    summed = group_advantages(rewards @ shares, group, 2)
    assert abs(summed[1] - summed[0]) < 0.02  # what the small one says is hardly heard
    # Exactly nothing where no function has a spread, or none applies.
    flat = rewards.copy()
    flat[4:] = [1.0, 3.0]
    flat[0] = np.nan
    found = normalize_then_sum_advantages(flat, shares, group, 2)
    np.testing.assert_array_equal(found[[0, 4, 5, 6, 7]], 0)
    assert np.abs(found[1:4]).min() > 0.1


#
# How a configuration chooses
#


def test_a_loss_states_its_options_and_the_configuration_has_them():
    stated = {key for loss in POLICY_LOSSES.values() for key in options_of(loss)}
    assert {"epsilon", "epsilon_high", "delta", "sapo_temperature_neg", "vespo_k_pos", "dppo_delta"} <= stated
    grpo = load_config().grpo
    assert stated <= set(type(grpo).model_fields)
    for name in POLICY_LOSSES:
        level = POLICY_LOSSES[name].traits.levels[0]
        chosen = load_config(None, [f"grpo.loss_type={name}", f"grpo.importance_sampling_level={level}"]).grpo
        assert type(make_policy_loss(name, chosen.loss_options)) is POLICY_LOSSES[name]
    chosen = load_config(None, ["grpo.loss_type=sapo", "grpo.sapo_temperature_neg=2.5"]).grpo
    loss = make_policy_loss("sapo", chosen.loss_options)
    assert (loss.sapo_temperature_pos, loss.sapo_temperature_neg) == (1.0, 2.5)
    # One key, another default in each loss.
    for name, default in (("dppo_tv", 0.2), ("dppo_kl", 0.05)):
        assert make_policy_loss(name, load_config(None, [f"grpo.loss_type={name}"]).grpo.loss_options).dppo_delta == (
            pytest.approx(default)
        )
    assert make_policy_loss("cispo", {"epsilon_high": None}).epsilon_high == 5.0


@pytest.mark.parametrize(
    "settings, message",
    [
        (["loss_type=luspo"], "made for grpo.importance_sampling_level = 'sequence', which is 'token'"),
        (["loss_type=vespo", "importance_sampling_level=sequence"], "made for .* 'token', which is 'sequence'"),
        (["loss_type=cispo", "delta=2.0"], "grpo.delta = 2.0 is an option of loss_type 'dapo' or .*: drop one"),
        (["sapo_temperature_pos=2.0"], "is an option of loss_type 'sapo', but grpo.loss_type = 'dapo'"),
        (["loss_type=vespo", "importance_sampling_correction=true"], "set 'token_truncate' or 'token_mask'"),
        (["loss_type=dppo_kl", "importance_sampling_correction=true"], "compares with the sampler by itself"),
        (["loss_type=bnpo", "max_tokens_per_micro_batch=100"], "whose value depends on the micro-batches"),
        (["use_kl_in_reward=true"], "grpo.use_kl_in_reward = True has no effect without grpo.beta above 0"),
        (["beta=0.1", "ref_model_sync_steps=5"], "no effect without grpo.sync_ref_model = true"),
        (["entropy_target=1.0"], "no effect without grpo.use_adaptive_entropy = true"),
        (["importance_sampling_mode=token_mask"], "no effect without grpo.importance_sampling_correction = true"),
        (
            [
                "importance_sampling_correction=true",
                "importance_sampling_clip_min=3.0",
            ],
            "clip_min = 3.0 is not below .*clip_max = 3.0",
        ),
        (["use_adaptive_entropy=true", "entropy_coef_min=2.0"], "grpo.entropy_coef_min = 2.0 is more than"),
        (["advantage_estimator=rloo", "scale_rewards=batch"], "'rloo' is not divided by a deviation"),
        (["advantage_estimator=rloo", "multi_objective_aggregation=normalize_then_sum"], "cannot be had with .*'rloo'"),
        (["top_entropy_quantile=1.5"], "must be a number of at least 0 and at most 1"),
        (["sapo_temperature_pos=0"], "must be a number greater than 0"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"grpo.{setting}" for setting in settings])


def test_a_run_of_before_does_not_change_its_kl_unasked(tmp_path):
    """Its config.toml has no `use_bias_correction_kl`, for there was no ratio."""
    old, new = (tmp_path / name for name in ("old.toml", "new.toml"))
    new.write_text(dump_config(load_config(None, ["grpo.beta=0.1"])), encoding="utf-8")
    lines = new.read_text(encoding="utf-8").splitlines()
    old.write_text("\n".join(line for line in lines if "use_bias_correction_kl" not in line), encoding="utf-8")
    with pytest.raises(ConfigError, match="use_bias_correction_kl was false in the run to be resumed and is true now"):
        check_resume(load_config(old), load_config(old))
    check_resume(load_config(old), load_config(old, ["grpo.use_bias_correction_kl=false"]))
    check_resume(load_config(new), load_config(new))


def test_scale_rewards_may_be_a_boolean():
    assert load_config(None, ["grpo.scale_rewards=false"]).grpo.scale_rewards == "none"
    assert load_config(None, ["grpo.scale_rewards=true"]).grpo.scale_rewards == "group"
