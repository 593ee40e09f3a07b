"""The policy's step on real rollouts of a tiny model: values, gradients, and when it refuses."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import EVERY_OPTION, TabularModel, quick_compilation, tiny_transformer
from tiny_run import tiny_model

from eqx_specgrpo._types import StopReason
from eqx_specgrpo.decoding import decode
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.grpo import (
    LossNormalizer,
    LossSettings,
    NonFiniteError,
    PolicyGradients,
    PolicyLossMetrics,
    UpdateBatch,
    adamw,
    apply_gradients,
    check_finite,
    compute_copy,
    global_norm,
    make_policy_loss,
    make_update_batch,
    padded_width,
    plan_micro_batches,
    policy_gradients,
    policy_logprobs,
    training_features,
)
from eqx_specgrpo.models import _sequence_attention, sequence_features
from eqx_specgrpo.sampling import Sampling

VOCAB, NEW = 67, 20
LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
ADVANTAGES = np.array([1.5, -0.5, -1.0, 0.5, -1.25, 0.0, 0.75, 1.0], np.float32)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def heads(hidden_size: int = 32, seed: int = 1) -> MedusaHeads:
    """Three heads that are sometimes right: fresh ones, disturbed."""
    weight_key, bias_key = jr.split(jr.key(seed))
    return MedusaHeads(
        0.1 * jr.normal(weight_key, (3, hidden_size, hidden_size)), 0.3 * jr.normal(bias_key, (3, hidden_size))
    )


def roll_out(model, temperature: float):
    """Two prompts of unequal length, four samples each; some completions end early and some are cut off."""
    return decode(
        model,
        [[5, 9, 11], [7, 3, 2, 8, 1, 30, 31]],
        draft=heads(),
        sampling=Sampling(jnp.float32(temperature)),
        key=jr.key(3),
        max_new_tokens=NEW,
        eos_ids=range(60, 67),
        samples=4,
        smallest_bucket=8,
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model(VOCAB, sharpness=15.0)


@pytest.fixture(scope="module")
def rollouts(model):
    return roll_out(model, 0.7)


@pytest.fixture(scope="module")
def batch(model, rollouts):
    """With old log-probabilities that are not the policy's own, so that ratios differ from 1 and some are clipped."""
    batch = make_update_batch(rollouts, ADVANTAGES)
    noise = 0.3 * np.asarray(jr.normal(jr.key(4), batch.old_logprobs.shape))
    return eqx.tree_at(lambda b: b.old_logprobs, batch, batch.old_logprobs + noise)


def with_reference(batch: UpdateBatch) -> UpdateBatch:
    reference = batch.old_logprobs + 0.4 * np.asarray(jr.normal(jr.key(5), batch.old_logprobs.shape))
    return eqx.tree_at(lambda b: b.reference_logprobs, batch, reference, is_leaf=lambda x: x is None)


def settings_of(**changes: Any) -> LossSettings:
    # The chunk divides neither the positions of the batch nor those of a micro-batch.
    loss = make_policy_loss(changes.pop("loss_type", "dapo"), {"epsilon": 0.2, "epsilon_high": 0.3})
    return LossSettings(**{"temperature": 0.7, "loss": loss, "chunk": 27, **changes})


def normalizer_of(batch: UpdateBatch, micro_batches: int = 1) -> LossNormalizer:
    return LossNormalizer.from_mask(np.asarray(batch.completion_mask), NEW, num_micro_batches=micro_batches)


@eqx.filter_value_and_grad
def _dense(model, tokens, places, old, advantages, reference, weights, beta):
    """The loss again, from whole logits and a list of the tokens that count; shares nothing but the forward."""
    logits = model.unembed(sequence_features(model, tokens).last) / 0.7
    logprobs = jax.nn.log_softmax(logits)[places]
    ratio = jnp.exp(logprobs - old)
    losses = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - 0.2, 1 + 0.3) * advantages)
    if reference is not None:
        gap = reference - logprobs
        losses = losses + beta * (jnp.exp(gap) - gap - 1)
    return jnp.sum(weights * losses)


_dense = eqx.filter_jit(_dense)


def dense_loss_and_gradients(model, batch: UpdateBatch, loss_type: str, beta: float):
    rows, columns, positions, tokens, weights = [], [], [], [], []
    lengths = batch.completion_mask.sum(1)
    for row, length in enumerate(lengths):
        for column in range(length):
            token = int(batch.completion_tokens[row, column])
            position = int(batch.prompt_lengths[row]) + column  # where the token stands; predicted one place before
            assert batch.tokens[row, position] == token
            rows.append(row)
            columns.append(column)
            positions.append(position - 1)
            tokens.append(token)
            weights.append(
                {
                    "dapo": 1 / lengths.sum(),
                    "bnpo": 1 / lengths.sum(),
                    "grpo": 1 / (len(lengths) * length),
                    "dr_grpo": 1 / (len(lengths) * NEW),
                }[loss_type]
            )
    old = jnp.asarray(batch.old_logprobs[rows, columns])
    reference = None if batch.reference_logprobs is None else jnp.asarray(batch.reference_logprobs[rows, columns])
    places = tuple(jnp.asarray(index) for index in (rows, positions, tokens))
    return _dense(
        model, jnp.asarray(batch.tokens), places, old, jnp.asarray(batch.advantages[rows]), reference,
        jnp.asarray(weights, jnp.float32), jnp.float32(beta),
    )  # fmt: skip


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def assert_close(tree, expected, tolerance: float = 1e-5):
    """Relative to the whole gradient: single entries may be near zero."""
    actual, wanted = flat(tree), flat(expected)
    assert np.linalg.norm(wanted) > 1e-3
    assert np.linalg.norm(actual - wanted) <= tolerance * np.linalg.norm(wanted)


def test_rollouts_exercise_what_is_tested(rollouts, batch, model):
    """Else the tests below would show less than they say."""
    assert set(rollouts.stop_reasons) == {StopReason.EOS, StopReason.LENGTH}
    assert len(set(rollouts.lengths)) > 2
    rate = rollouts.statistics.acceptance_rate
    assert 0.1 < rate < 0.9
    gradients, _ = policy_gradients(model, batch, normalizer_of(batch), settings_of())
    means = gradients.metrics.means()
    assert means["clip_ratio/low_mean"] > 0 and means["clip_ratio/high_mean"] > 0


@pytest.mark.parametrize("loss_type, beta", [("dapo", 0.0), *((name, 0.04) for name in LOSS_TYPES)])
def test_gradients_are_those_of_a_dense_reference(loss_type, beta, model, batch):
    batch = with_reference(batch) if beta else batch
    plainly = dict(use_bias_correction_kl=False)
    result, _ = policy_gradients(
        model, batch, normalizer_of(batch), settings_of(loss_type=loss_type, beta=beta, **plainly)
    )
    loss, gradients = dense_loss_and_gradients(model, batch, loss_type, beta)
    np.testing.assert_allclose(result.loss, loss, rtol=2e-5)
    assert_close(result.gradients, gradients)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_to_one_batch(loss_type, model, batch):
    batch = with_reference(batch)
    settings = settings_of(loss_type=loss_type, beta=0.04)
    whole, features = policy_gradients(model, batch, normalizer_of(batch), settings)
    total, parts = None, []
    for start in (0, 4):
        # A micro-batch holds rows of unequal lengths, so that averages of averages would be wrong.
        part, part_features = policy_gradients(
            model, batch.rows(slice(start, start + 4)), normalizer_of(batch, micro_batches=2), settings
        )
        parts.append(part_features.last)
        total = part if total is None else total + part
    assert total is not None
    np.testing.assert_allclose(jnp.concatenate(parts), features.last, atol=1e-5)
    means, expected_means = total.metrics.means(), whole.metrics.means()
    for name, value in expected_means.items():
        np.testing.assert_allclose(means[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(total.entropy_sum, whole.entropy_sum, rtol=1e-5)
    counts = [int(batch.completion_mask[:4].sum()), int(batch.completion_mask[4:].sum())]
    assert counts[0] != counts[1]
    if loss_type == "bnpo":
        # By definition the mean over each micro-batch: the one type for which dividing a step changes it.
        assert abs(float(total.loss - whole.loss)) > 1e-4
        return
    np.testing.assert_allclose(total.loss, whole.loss, rtol=1e-5)
    assert_close(total.gradients, whole.gradients)


@pytest.mark.parametrize("layers", [(), (1, 0)])
def test_checkpointed_gradients_are_the_same(layers, model, batch):
    plain = settings_of(layers=layers)
    kept, kept_features = policy_gradients(model, batch, normalizer_of(batch), plain)
    settings = settings_of(layers=layers, gradient_checkpointing=True)
    again, features = policy_gradients(model, batch, normalizer_of(batch), settings)
    np.testing.assert_allclose(again.loss, kept.loss, rtol=1e-5)
    assert_close(again.gradients, kept.gradients)
    for value, wanted in zip(jax.tree.leaves(features), jax.tree.leaves(kept_features), strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": 5}, EVERY_OPTION], ids=["whole", "sliding window", "every option"]
)
def test_prompts_computed_once_change_nothing(changes, checkpointing, batch):
    model = tiny_transformer(**{"vocab_size": VOCAB, "qk_norm": True, **changes})
    settings = settings_of(layers=(1, 0), gradient_checkpointing=checkpointing)
    # Ratios of 1, none of them clipped.
    own = np.asarray(policy_logprobs(model, batch, settings))
    batch = eqx.tree_at(lambda b: b.old_logprobs, batch, own)
    for rows in (slice(0, 8), np.array([6, 1, 5])):
        part = batch.rows(rows)
        shared, features = policy_gradients(model, part, normalizer_of(part), settings)
        loss, gradients = dense_loss_and_gradients(model, part, "dapo", 0.0)
        np.testing.assert_allclose(shared.loss, loss, rtol=2e-5)
        # Twice the layers, and norms behind each: rounding is amplified more.
        assert_close(shared.gradients, gradients, 5e-5 if changes is EVERY_OPTION else 1e-5)
        ends = part.prompt_lengths + part.completion_mask.sum(1)
        valid = np.arange(part.tokens.shape[1])[None] < ends[:, None]
        expected = eqx.filter_jit(sequence_features)(model, jnp.asarray(part.tokens), layers=(1, 0))
        for value, wanted in zip(jax.tree.leaves(features), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.asarray(value)[valid], np.asarray(wanted)[valid], atol=2e-5)
    assert len(part.prompt_rows) == 2 and len(set(part.prompt_lengths)) == 2


def test_attention_by_blocks_changes_nothing(batch, monkeypatch):
    """Sequences as short as these go the dense way otherwise."""
    model = tiny_transformer(vocab_size=VOCAB, qk_norm=True, sliding_window=9)
    part = batch.rows(np.array([6, 1, 5, 2, 7]))
    settings = settings_of(gradient_checkpointing=True, chunk=31)
    own = np.asarray(policy_logprobs(model, part, settings_of(chunk=33)))
    part = eqx.tree_at(lambda b: b.old_logprobs, part, own)
    loss, gradients = dense_loss_and_gradients(model, part, "dapo", 0.0)
    monkeypatch.setattr(_sequence_attention, "_FEW_SLOTS", 0)
    asked = []
    attend = _sequence_attention.blockwise_attention
    monkeypatch.setattr(_sequence_attention, "blockwise_attention", lambda *given: asked.append(1) or attend(*given))
    jax.clear_caches()
    found, _ = policy_gradients(model, part, normalizer_of(part), settings)
    jax.clear_caches()
    assert asked
    np.testing.assert_allclose(found.loss, loss, rtol=2e-5)
    assert_close(found.gradients, gradients)


def test_checkpointing_saves_memory():
    """Of unrolled layers XLA merges the second computation with the first; a loop has to be there."""
    model = tiny_model(VOCAB, hidden_size=32, num_layers=12)
    rows, seq = 16, 48
    zeros = np.zeros((rows, seq), np.int32)
    batch = UpdateBatch(
        np.pad(zeros, ((0, 0), (1, 0))),
        np.ones(rows, np.int32),
        zeros,
        zeros == 0,
        0.0 * zeros.astype(np.float32),
        np.ones(rows, np.float32),
        np.arange(rows),
        np.arange(rows),
    )

    def temporary(checkpointing):
        settings = settings_of(gradient_checkpointing=checkpointing)
        compiled = policy_gradients.lower(model, batch, normalizer_of(batch), settings).compile()
        return compiled.compiled.memory_analysis().temp_size_in_bytes

    assert temporary(True) < 0.5 * temporary(False)


def test_only_a_transformer_can_be_checkpointed(batch):
    other = TabularModel(jnp.zeros((4, 3, 3)))
    with pytest.raises(UserError, match="gradient_checkpointing goes through .* the policy is a TabularModel"):
        training_features(other, batch, gradient_checkpointing=True)


def test_widths_are_few_and_cover():
    lengths = np.arange(1, 2049)
    widths = np.array([padded_width(int(length)) for length in lengths])
    assert (widths >= lengths).all() and len(set(widths)) == 18
    assert (widths - lengths < np.maximum(64, lengths / 4)).all()


@pytest.mark.parametrize("longest, limit, width", [(3, 1000, 64), (250, 1000, 256), (530, 1000, 640), (530, 600, 600)])
def test_a_batch_has_a_width_of_the_ladder_or_the_limit(longest, limit, width, rollouts):
    def widened(x):
        return np.pad(np.asarray(x), ((0, 0), (0, limit - x.shape[1])))

    lengths = np.minimum(rollouts.lengths, longest)
    lengths[-1] = longest
    arrays = widened(rollouts.tokens), widened(rollouts.logprobs), lengths
    batch = make_update_batch(eqx.tree_at(lambda r: (r.tokens, r.logprobs, r.lengths), rollouts, arrays), ADVANTAGES)
    assert batch.completion_tokens.shape[1] == batch.completion_mask.shape[1] == width
    assert batch.completion_mask.sum(axis=1).tolist() == lengths.tolist()


def test_plan_saves_padding_and_keeps_to_its_budget():
    lengths = np.array([60, 250, 30, 200, 64, 10, 50, 190])
    plan = plan_micro_batches(lengths, 256)
    # Longest first, and the short ones apart.
    assert [(rows.tolist(), width) for rows, width, _ in plan] == [([1, 3, 7, 4], 256), ([0, 6, 2, 5], 64)]
    assert len(plan_micro_batches(np.full(8, 200), 256)) == 1
    assert len(plan_micro_batches(lengths, 256, overhead=2000)) == 1
    for budget in (2048, 1024, 512, 300, 100):
        plan = plan_micro_batches(lengths, 256, max_tokens=budget)
        assert sorted(np.concatenate([part.rows for part in plan])) == list(range(8))
        assert all(lengths[part.rows].max() <= part.width for part in plan)
        # A budget below a row's own width leaves each row alone.
        assert all(len(part.rows) * part.width <= max(budget, 256) for part in plan)
    assert [len(part.rows) for part in plan_micro_batches(np.full(6, 9), 64, num_parts=3)] == [2, 2, 2]
    kept = plan_micro_batches(lengths, 256, num_parts=2, sort=False)
    assert [(rows.tolist(), width) for rows, width, _ in kept] == [([0, 1, 2, 3], 256), ([4, 5, 6, 7], 192)]
    # Never wider than the sequences' array.
    assert plan_micro_batches(np.full(4, 70), 100)[0].width == 100
    # What saves little is not worth its compilation.
    assert len(plan_micro_batches(np.array([250, 250, 190, 190]), 256, overhead=0)) == 2
    assert len(plan_micro_batches(np.array([250, 250, 220, 220]), 256, overhead=0)) == 1
    with pytest.raises(ValueError, match="num_parts is 3, which does not divide 8 rows"):
        plan_micro_batches(lengths, 256, num_parts=3)


def test_plan_keeps_rows_that_teach_nothing_apart():
    lengths = np.array([100, 128, 90, 128, 80, 100, 70, 60])
    late, third, none = np.arange(8) > 3, np.arange(8) == 3, np.zeros(8, bool)
    plan = plan_micro_batches(lengths, 128, rows_with_gradient=late)
    assert [(part.rows.tolist(), part.has_gradient) for part in plan] == [([5, 4, 6, 7], True), ([1, 3, 0, 2], False)]
    # One row that learns is not left out for the seven that do not.
    alone = plan_micro_batches(lengths, 128, rows_with_gradient=third)
    assert [part.rows.tolist() for part in alone if part.has_gradient] == [[1, 3]]
    assert sorted(np.concatenate([part.rows for part in alone])) == list(range(8))
    # Where rows may not change places, and where none of them teaches anything.
    kept = plan_micro_batches(lengths, 128, num_parts=2, sort=False, rows_with_gradient=third)
    assert [(part.rows.tolist(), part.has_gradient) for part in kept] == [([0, 1, 2, 3], True), ([4, 5, 6, 7], False)]
    assert [part.has_gradient for part in plan_micro_batches(lengths, 128, rows_with_gradient=none)] == [False]
    # A long row that teaches nothing does not pad short ones that do; forwards, too, have an overhead.
    unequal = np.array([100, 100, 100, 100, 10, 10, 10, 10])
    plan = plan_micro_batches(unequal, 128, rows_with_gradient=np.arange(8) > 0)
    assert [part.rows.tolist() for part in plan] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(plan_micro_batches(np.array([500] + 7 * [10]), 512, rows_with_gradient=none)) == 4


def test_a_row_has_a_gradient_if_a_token_counts_and_it_has_an_advantage_or_a_reference(batch):
    mask = np.array(batch.completion_mask)
    mask[1] = False
    batch = eqx.tree_at(lambda b: b.completion_mask, batch, mask)
    assert ADVANTAGES[5] == 0
    assert np.flatnonzero(~batch.rows_with_gradient(with_kl=False)).tolist() == [1, 5]
    assert np.flatnonzero(~batch.rows_with_gradient(with_kl=True)).tolist() == [1]


def test_gradients_that_are_not_there_add_nothing():
    def made(gradients):
        # Each number an array of its own: addition donates them.
        zero = lambda: jnp.float32(0.0)
        metrics = PolicyLossMetrics(zero(), zero(), {"clip_ratio/low_mean": zero()}, zero(), zero())
        return PolicyGradients(gradients, jnp.float32(1.0), metrics, jnp.float32(2.0))

    there = lambda: made({"w": jnp.array([1.0, 2.0])})
    for total in (made(None) + there(), there() + made(None), made(None) + there() + made(None)):
        assert total.gradients is not None
        np.testing.assert_array_equal(total.gradients["w"], [1.0, 2.0])
    assert float(total.loss) == 3 and float(total.entropy_sum) == 6
    assert (made(None) + made(None)).gradients is None


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_ratio_is_one(temperature, model):
    """The verify pass's log-probabilities are the old ones: same weights, same distribution, so a ratio of 1."""
    rollouts = roll_out(model, temperature)
    statistics = rollouts.statistics
    assert 0 < statistics.accepted.sum() < statistics.drafted.sum()
    batch = make_update_batch(rollouts, ADVANTAGES)
    settings = settings_of(temperature=temperature)
    logprobs = np.asarray(policy_logprobs(model, batch, settings))
    ratio = np.exp(logprobs - batch.old_logprobs)[batch.completion_mask]
    np.testing.assert_allclose(ratio, 1.0, atol=1e-5, rtol=0)
    result, _ = policy_gradients(model, batch, normalizer_of(batch), settings)
    means = result.metrics.means()
    assert 0 <= means["log_ratio/abs_max"] < 1e-5
    assert means["clip_ratio/region_mean"] == 0
    # At a ratio of 1 the loss is minus the token mean of the advantages.
    expected = -(ADVANTAGES * rollouts.lengths).sum() / rollouts.lengths.sum()
    np.testing.assert_allclose(result.loss, expected, rtol=1e-4)
    # The alarm rings at another temperature than the one sampled at.
    wrong, _ = policy_gradients(model, batch, normalizer_of(batch), settings_of(temperature=temperature + 0.1))
    assert wrong.metrics.means()["log_ratio/abs_max"] > 0.05


def test_padding_does_not_matter(model, batch):
    batch = with_reference(batch)
    rng = np.random.default_rng(0)
    counted = np.asarray(batch.completion_mask)
    rows, new = counted.shape
    settings, normalizer = settings_of(beta=0.04), normalizer_of(batch)
    expected, _ = policy_gradients(model, batch, normalizer, settings)

    tokens = np.array(batch.tokens)
    ends = batch.prompt_lengths + counted.sum(1)
    beyond = np.arange(tokens.shape[1])[None] >= ends[:, None]
    tokens[beyond] = rng.integers(0, VOCAB, beyond.sum())
    completion_tokens = np.where(counted, batch.completion_tokens, rng.integers(0, VOCAB, counted.shape))
    assert (~counted).any()

    def rubbish(values):
        return np.where(counted, values, rng.choice([np.nan, np.inf, -1e30, 1e30], counted.shape)).astype(np.float32)

    other = UpdateBatch(
        tokens,
        batch.prompt_lengths,
        completion_tokens.astype(np.int32),
        counted,
        rubbish(batch.old_logprobs),
        batch.advantages,
        batch.prompt_rows,
        batch.prompt_of_row,
        rubbish(batch.reference_logprobs),
    )
    result, _ = policy_gradients(model, other, normalizer, settings)
    np.testing.assert_array_equal(result.loss, expected.loss)
    for value, wanted in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(value, wanted)

    def widen(array, width, fill):
        return np.pad(array, ((0, 0), (0, width)), constant_values=fill)

    wider = UpdateBatch(
        widen(tokens, 13, 5),
        batch.prompt_lengths,
        widen(other.completion_tokens, 6, 9),
        widen(counted, 6, False),
        widen(other.old_logprobs, 6, np.nan),
        batch.advantages,
        batch.prompt_rows,
        batch.prompt_of_row,
        widen(other.reference_logprobs, 6, np.nan),
    )
    result, _ = policy_gradients(model, wider, normalizer, settings)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-5)
    assert_close(result.gradients, expected.gradients)


def test_reference_that_is_the_policy_has_no_kl(model, rollouts):
    batch = make_update_batch(rollouts, ADVANTAGES)
    settings = settings_of(beta=10.0)
    reference = np.asarray(policy_logprobs(model, batch, settings))
    with_kl = eqx.tree_at(lambda b: b.reference_logprobs, batch, reference, is_leaf=lambda x: x is None)
    result, _ = policy_gradients(model, with_kl, normalizer_of(batch), settings)
    without, _ = policy_gradients(model, batch, normalizer_of(batch), settings_of(beta=0.0))
    assert 0 <= float(result.metrics.means()["kl"]) < 1e-9
    assert "kl" not in without.metrics.means()
    # k3 has no slope where the two agree, however large beta.
    np.testing.assert_allclose(result.loss, without.loss, rtol=1e-4)
    assert_close(result.gradients, without.gradients, tolerance=1e-3)


def test_truncated_completions_may_be_left_out(model, rollouts):
    truncated = rollouts.stop_reasons == StopReason.LENGTH
    all_in = make_update_batch(rollouts, ADVANTAGES)
    masked = make_update_batch(rollouts, ADVANTAGES, mask_truncated_completions=True)
    np.testing.assert_array_equal(masked.completion_mask.sum(1), np.where(truncated, 0, rollouts.lengths))
    np.testing.assert_array_equal(all_in.completion_mask.sum(1), rollouts.lengths)
    assert masked.completion_mask.any()
    result, _ = policy_gradients(model, masked, normalizer_of(masked), settings_of())
    # Whatever the truncated ones' advantages are, they are not heard; and they are not counted in the divisor.
    advantages = np.where(truncated, 100.0, ADVANTAGES).astype(np.float32)
    loud = make_update_batch(rollouts, advantages, mask_truncated_completions=True)
    same, _ = policy_gradients(model, loud, normalizer_of(loud), settings_of())
    for value, wanted in zip(jax.tree.leaves(same), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(value, wanted)
    ended = ~truncated
    expected = -(ADVANTAGES * rollouts.lengths)[ended].sum() / rollouts.lengths[ended].sum()
    np.testing.assert_allclose(result.loss, expected, rtol=1e-4)


def test_a_batch_without_a_counted_token_gives_zero_not_nan(model, batch):
    nothing = eqx.tree_at(lambda b: b.completion_mask, batch, np.zeros_like(batch.completion_mask))
    result, _ = policy_gradients(model, nothing, normalizer_of(nothing), settings_of())
    assert float(result.loss) == 0 and float(global_norm(result.gradients)) == 0


def test_bfloat16_gradients_point_the_same_way(model, batch):
    settings, normalizer = settings_of(), normalizer_of(batch)
    exact, _ = policy_gradients(model, batch, normalizer, settings)
    rounded = compute_copy(model, "bfloat16")
    assert rounded.blocks[0].mlp.down.weight.dtype == jnp.bfloat16 and rounded.norm.weight.dtype == jnp.float32
    result, features = policy_gradients(rounded, batch, normalizer, settings)
    assert features.last.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result.gradients))
    assert jax.tree.structure(result.gradients) == jax.tree.structure(exact.gradients)
    a, b = flat(result.gradients), flat(exact.gradients)
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.99
    assert np.linalg.norm(a - b) > 0  # The dtype does reach the arithmetic.


def test_apply_gradients_is_optax_adamw(model):
    params = eqx.filter(model, eqx.is_inexact_array)
    # (learning rate, norm of the gradient); the second gradient is clipped to a norm of 1.
    schedule = ((3e-3, 0.5), (1e-3, 50.0), (2e-3, 0.9))
    rates = jnp.array([rate for rate, _ in schedule])
    # The library's rate is an argument, optax's a schedule; the mask is decided here, name by name.
    decay = jax.tree.map(lambda _: True, params)
    norms = lambda m: [m.norm, *(norm for b in m.blocks for norm in (b.attention_norm, b.mlp_norm))]
    decay = eqx.tree_at(lambda m: [norm.weight for norm in norms(m)], decay, replace_fn=lambda _: False)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda step: rates[step], b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, mask=decay),
    )
    update = jax.jit(reference.update)
    expected, expected_state = params, reference.init(params)
    optimizer = adamw(beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1, max_grad_norm=1.0)
    # Copies: what is given to `apply_gradients` is donated.
    moved = jax.tree.map(lambda x: jnp.array(x) if eqx.is_array(x) else x, model)
    state = optimizer.init(eqx.filter(moved, eqx.is_inexact_array))
    rng = np.random.default_rng(0)
    for rate, norm in schedule:
        raw = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        scale = norm / np.linalg.norm(flat(raw))
        gradients = jax.tree.map(lambda g, scale=scale: jnp.asarray(scale * g, jnp.float32), raw)
        moved, state = apply_gradients((optimizer, gradients, jnp.float32(rate)), moved, state)
        updates, expected_state = update(gradients, expected_state, expected)
        expected = eqx.apply_updates(expected, updates)
    change = flat(eqx.filter(moved, eqx.is_inexact_array)) - flat(params)
    wanted = flat(expected) - flat(params)
    assert np.linalg.norm(wanted) > 1e-3
    np.testing.assert_allclose(change, wanted, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_what_and_when(value):
    check_finite("policy", 7, loss=jnp.float32(1.0), grad_norm=jnp.float32(0.0))
    with pytest.raises(
        NonFiniteError, match=r"^step 7: the policy's grad_norm is (nan|inf|-inf)\. This update was not"
    ):
        check_finite("policy", 7, loss=jnp.float32(1.0), grad_norm=jnp.float32(value))
