"""The draft's step: equal to a dense computation, aligned, blind to the policy's loss, and of use."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation
from tiny_run import tiny_config, tiny_folder as tiny_folder, tiny_model, tiny_tokenizer

from eqx_specgrpo._types import ScoredRollouts, StopReason
from eqx_specgrpo.config._parts import make_parts
from eqx_specgrpo.decoding import decode
from eqx_specgrpo.distill import DraftBatch, ForwardKL, LKHybrid, draft_gradients, select_rows
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.grpo import (
    PlannedMicroBatch,
    adamw,
    apply_gradients,
    make_update_batch,
    plan_micro_batches,
    policy_gradients,
)
from eqx_specgrpo.models import Features, sequence_features
from eqx_specgrpo.sampling import Sampling
from eqx_specgrpo.train._draft_step import draft_rows, features_of, update_draft
from eqx_specgrpo.train._state import RunState
from eqx_specgrpo.train._step import update_policy

VOCAB, HEADS = 67, 3
PROMPTS, COMPLETIONS = (3, 7, 5, 1), (9, 1, 4, 12)  # with 1, 2 and 0 predictions for the last head in short rows
NEW, WIDTH = 12, 21
TEMPERATURE, DECAY = 0.7, 0.8


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def heads(seed: int = 1, hidden_size: int = 32) -> MedusaHeads:
    weight_key, bias_key = jr.split(jr.key(seed))
    weight = 0.1 * jr.normal(weight_key, (HEADS, hidden_size, hidden_size))
    return MedusaHeads(weight, 0.3 * jr.normal(bias_key, (HEADS, hidden_size)))


@pytest.fixture(scope="module")
def model():
    return tiny_model(VOCAB, sharpness=15.0)


@pytest.fixture(scope="module")
def batch(model):
    tokens = jr.randint(jr.key(2), (len(PROMPTS), WIDTH), 0, VOCAB)
    return DraftBatch(
        eqx.filter_jit(sequence_features)(model, tokens), tokens, jnp.array(PROMPTS), jnp.array(COMPLETIONS)
    )


def gradients_of(draft, model, batch, loss=None, alpha=0.3, chunk=13, new=NEW):
    return draft_gradients(
        draft,
        model,
        batch,
        ForwardKL() if loss is None else loss,
        temperature=jnp.float32(TEMPERATURE),
        alpha=jnp.full(draft.max_length, alpha),
        position_decay=jnp.float32(DECAY),
        new=new,
        chunk=chunk,
    )


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def assert_close(tree, expected, tolerance: float = 1e-5):
    actual, wanted = flat(tree), flat(expected)
    assert np.linalg.norm(wanted) > 1e-3
    assert np.linalg.norm(actual - wanted) <= tolerance * np.linalg.norm(wanted)


def predictions(shift: int) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """For each head: rows, positions whose features it sees, and positions of its teacher. Written out, one by one.

    Position `p` of a sequence predicts token `p + 1`. A draft that has seen `p` begins with token `p + 2`, for the
    target itself gives `p + 1`; head `k` gives token `p + 2 + k`, which the target predicts at `p + 1 + k`.
    """
    found = {}
    for head in range(HEADS):
        entries = []
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            last_token = prompt + completion - 1
            for seen in range(prompt - 1, last_token):  # the first prediction of the completion, and on
                if seen + 2 + head <= last_token:
                    entries.append((row, seen, seen + 1 + head + shift))
        found[head] = tuple(map(list, zip(*entries, strict=True)))
    return found


def dense(draft, model, batch, loss: str, alpha: float, shift: int = 0):
    """Loss, gradients and acceptances from whole logits."""
    places = predictions(shift)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def dense_loss(draft):
        hidden = batch.features.last
        target = jax.nn.softmax(hidden @ model.unembedding.T / TEMPERATURE)
        total, acceptances = 0.0, []
        for head, (rows, seen, teacher) in places.items():
            x = hidden[jnp.array(rows), jnp.array(seen)]
            x = x + jax.nn.silu(x @ draft.weight[head].T + draft.bias[head][None])
            log_q = jax.nn.log_softmax(x @ model.unembedding.T / TEMPERATURE)
            p, q = target[jnp.array(rows), jnp.array(teacher)], jnp.exp(log_q)
            overlap = jnp.minimum(p, q).sum(-1)
            kl = (p * (jnp.log(p) - log_q)).sum(-1)
            weight = np.exp(-10.0 * alpha) if loss == "hybrid" else 1.0
            losses = weight * kl + (1 - weight) * (1 - overlap)
            total = total + DECAY**head / sum(DECAY**i for i in range(HEADS)) * losses.mean()
            acceptances.append(overlap.mean())
        return total, jnp.stack(acceptances)

    (value, acceptances), gradients = dense_loss(draft)
    return value, gradients, acceptances


@pytest.mark.parametrize("loss", ["kl", "hybrid"])
def test_chunks_equal_the_dense_computation(loss, model, batch):
    """Chunks cut through rows, and none divides the positions; prompts and completions are of unequal lengths."""
    objective = {"kl": ForwardKL(), "hybrid": LKHybrid(eta=10.0)}[loss]
    value, gradients, acceptances = dense(heads(), model, batch, loss, alpha=0.1)
    for chunk in (13, 64) if loss == "kl" else (13,):
        assert (len(PROMPTS) * NEW) % chunk
        result = gradients_of(heads(), model, batch, objective, alpha=0.1, chunk=chunk)
        np.testing.assert_allclose(result.loss, value, rtol=1e-5)
        np.testing.assert_allclose(result.acceptance, acceptances, rtol=1e-5)
        assert_close(result.gradients, gradients)


def test_a_shifted_teacher_is_noticed(model, batch):
    """What `test_chunks_equal_the_dense_computation` compares with is not blind to being off by one."""
    right = gradients_of(heads(), model, batch)
    for shift in (-1, 1):
        value, gradients, _ = dense(heads(), model, batch, "kl", alpha=0.1, shift=shift)
        assert abs(float(right.loss - value)) > 0.05
        assert np.linalg.norm(flat(right.gradients) - flat(gradients)) > 0.1 * np.linalg.norm(flat(gradients))


@pytest.mark.parametrize("off_by", [-1, 0, 1])
def test_head_k_learns_what_the_target_says_k_and_one_places_on(off_by):
    """A target whose features at position `p` are the unit vector `p`, and heads that move it by a number of places."""
    size, sure = 24, 20.0
    target = tiny_model(size, hidden_size=size)
    target = eqx.tree_at(lambda m: m.unembedding, target, jnp.eye(size))
    features = jnp.broadcast_to(sure * jnp.eye(size)[None, :WIDTH], (len(PROMPTS), WIDTH, size))
    tokens = jnp.zeros((len(PROMPTS), WIDTH), jnp.int32)
    # Head k: h + silu(3 S h), with S the shift by 1 + k places: it says `p + 1 + k` with certainty.
    shifts = jnp.stack([3 * jnp.eye(size, k=-(1 + k + off_by)) for k in range(HEADS)])
    draft = MedusaHeads(shifts, jnp.zeros((HEADS, size)))
    batch = DraftBatch(Features(features), tokens, jnp.array(PROMPTS), jnp.array(COMPLETIONS))
    result = gradients_of(draft, target, batch)
    if off_by == 0:
        np.testing.assert_allclose(result.acceptance, 1.0, atol=1e-3)
        assert float(result.loss) < 1e-3
    else:
        np.testing.assert_allclose(result.acceptance, 0.0, atol=1e-3)
        assert float(result.loss) > 10


def test_only_the_draft_is_differentiated(model, batch):
    def loss_of(draft, target, features):
        return gradients_of(draft, target, eqx.tree_at(lambda b: b.features, batch, features)).loss

    @eqx.filter_jit
    @eqx.filter_grad
    def through(arguments):
        return loss_of(*arguments)

    to_draft, to_target, to_features = through((heads(), model, batch.features))
    assert not flat(to_target).any() and not flat(to_features).any()
    # What the chunks assemble by hand is what differentiating the loss gives.
    assert_close(gradients_of(heads(), model, batch).gradients, to_draft)


def test_padding_and_rows_left_out_do_not_matter(model, batch):
    expected = gradients_of(heads(), model, batch)
    ends = np.array(PROMPTS) + np.array(COMPLETIONS)
    beyond = np.arange(WIDTH)[None] >= ends[:, None]
    rubbish = jnp.where(beyond[:, :, None], 1e4, batch.features.last)
    padded = DraftBatch(
        Features(jnp.pad(rubbish, ((0, 0), (0, 5), (0, 0)))),
        jnp.pad(jnp.where(beyond, 9, batch.tokens), ((0, 0), (0, 5))),
        batch.prompt_lengths,
        batch.completion_lengths,
    )
    for result in (gradients_of(heads(), model, padded), gradients_of(heads(), model, batch, new=NEW + 4)):
        np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-5)
        assert_close(result.gradients, expected.gradients)
    chosen = select_rows(
        batch.features, batch.tokens, batch.prompt_lengths, batch.completion_lengths, jnp.array([0, 3])
    )
    few = jax.tree.map(lambda x: x[jnp.array([0, 3])], batch)
    for value, wanted in zip(jax.tree.leaves(chosen), jax.tree.leaves(few), strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_completions_too_short_to_draft_in_teach_nothing_and_do_no_harm(model, batch):
    # A completion of one token has no second one to guess; one of two tokens teaches the first head alone.
    short = eqx.tree_at(lambda b: b.completion_lengths, batch, jnp.array([1, 1, 2, 1]))
    result = gradients_of(heads(), model, short)
    assert np.isfinite(flat(result.gradients)).all() and np.isfinite(result.loss)
    assert flat(result.gradients.weight[0]).any() and not flat(result.gradients.weight[1:]).any()
    none = eqx.tree_at(lambda b: b.completion_lengths, batch, jnp.array([1, 1, 1, 1]))
    result = gradients_of(heads(), model, none)
    assert float(result.loss) == 0 and not flat(result.gradients).any()


def test_rows_without_a_say_in_the_policy_loss_teach_the_draft(tiny_folder, tmp_path):
    """Cut off completions, masked out of the policy's loss, and groups whose advantages are zero."""
    config = tiny_config(tiny_folder, tmp_path, "grpo.mask_truncated_completions=true", "draft.learning_rate=1e-2")
    policy = tiny_model()
    rollouts = decode(
        policy, [[5, 9, 11], [7, 3, 2, 8, 1]], key=jr.key(0), max_new_tokens=8, samples=2, smallest_bucket=4
    )
    assert (rollouts.stop_reasons == StopReason.LENGTH).all()
    zeros = np.zeros(4)
    scored = ScoredRollouts(rollouts, zeros[:, None], zeros, zeros)
    parts = make_parts(config, tiny_tokenizer(), heads())
    before = heads()
    state = RunState.fresh(policy, heads(), parts.policy_optimizer, parts.draft_optimizer)
    weights_before = flat(eqx.filter(policy, eqx.is_inexact_array))
    policy, optimizer, weights, features, batch, metrics, _ = update_policy(
        parts, state.policy, state.policy_optimizer, None, scored, 0.1, 0
    )
    assert not batch.completion_mask.any()
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    np.testing.assert_array_equal(flat(eqx.filter(policy, eqx.is_inexact_array)), weights_before)
    state = RunState(policy, optimizer, state.draft, state.draft_optimizer, state.draft_acceptance)
    rows = draft_rows(jr.key(1), 4, 0.5)
    assert len(rows) == 2
    state, metrics = update_draft(parts, state, weights, features, batch, rollouts.lengths, rows, 0)
    assert metrics["draft/loss"] > 0.1 and metrics["draft/grad_norm"] > 0.01
    assert (np.asarray(state.draft.weight) != np.asarray(before.weight)).mean() > 0.9
    # The features of the policy's forward are those of a forward of its own.
    again = features_of(weights, batch, ())
    found = (np.asarray(one.features.last)[one.slots] for one in (features, again))
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.fixture(scope="module")
def unequal():
    """Rollouts of which some fit a narrower width than others."""
    rollouts = decode(tiny_model(), [[5, 9, 11], [7, 3, 2, 8, 1]], key=jr.key(2), max_new_tokens=80, samples=4)
    rollouts = eqx.tree_at(lambda r: r.lengths, rollouts, np.array([80, 9, 20, 1, 71, 5, 40, 50], np.int32))
    rewards = np.arange(8) % 3 - 1.0
    return ScoredRollouts(rollouts, rewards[:, None], rewards, rewards.astype(np.float32))


def updated(folder, out, scored, *settings: str, momentum: float = 0.0):
    config = tiny_config(folder, out, "grpo.max_completion_length=80", *settings)
    parts = make_parts(config, tiny_tokenizer(), heads())
    policy, reference = tiny_model(), tiny_model(sharpness=14.0) if config.grpo.beta else None
    optimizer = parts.policy_optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    optimizer = jax.tree.map(lambda x: x + momentum if eqx.is_inexact_array(x) else x, optimizer)
    policy, _, _, features, batch, metrics, _ = update_policy(parts, policy, optimizer, reference, scored, 1e-3, 0)
    last = np.asarray(features.features.last)[features.slots]
    return flat(eqx.filter(policy, eqx.is_inexact_array)), last, batch, metrics


def undivided(lengths, width, **_):
    """All rows in one micro-batch, with their backward."""
    return [PlannedMicroBatch(np.arange(len(lengths)), width, has_gradient=True)]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_how_rows_are_divided_changes_nothing(loss_type, unequal, tiny_folder, tmp_path, monkeypatch):
    """Sorted, cut to their width and divided, against all rows at once at full width: the same to rounding."""
    from eqx_specgrpo.train import _step

    divisions = []

    def record(lengths, width, **kwargs):
        divisions.append(plan_micro_batches(lengths, width, overhead=0, **kwargs))
        return divisions[-1]

    loss = (f"grpo.loss_type={loss_type}", "grpo.beta=0.04")
    monkeypatch.setattr(_step, "plan_micro_batches", undivided)
    weights, features, batch, metrics = updated(tiny_folder, tmp_path, unequal, *loss)
    start = flat(eqx.filter(tiny_model(), eqx.is_inexact_array))
    monkeypatch.setattr(_step, "SMALL_HIDDEN_SIZE", 0)
    monkeypatch.setattr(_step, "plan_micro_batches", record)
    ends = batch.prompt_lengths + unequal.rollouts.lengths
    valid = np.arange(batch.tokens.shape[1])[None] < ends[:, None]
    choices = [(), ("grpo.max_tokens_per_micro_batch=100", "grpo.gradient_checkpointing=true")]
    for settings in choices if loss_type == "dapo" else choices[:1]:
        other, other_features, other_batch, other_metrics = updated(tiny_folder, tmp_path, unequal, *loss, *settings)
        assert len({part.width for part in divisions[-1]}) > 1
        assert all(part.has_gradient for part in divisions[-1]), "all are held to the reference"
        # Adam divides by the gradient's size: what matters is the direction of the whole step.
        step, other_step = weights - start, other - start
        assert np.linalg.norm(step) > 1e-2
        assert np.linalg.norm(other_step - step) < 1e-2 * np.linalg.norm(step)
        np.testing.assert_allclose(other_features[valid], features[valid], atol=1e-4)
        counted = batch.completion_mask
        np.testing.assert_allclose(
            other_batch.reference_logprobs[counted], batch.reference_logprobs[counted], rtol=1e-4, atol=1e-5
        )
        assert other_metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("taught", [4, 0])
def test_rows_that_teach_nothing_get_no_backward(taught, unequal, tiny_folder, tmp_path, monkeypatch):
    """Nor do they need one: the policy, the features that the draft learns from and all metrics are as if they had."""
    from eqx_specgrpo.train import _step

    advantages = np.where(np.arange(8) < taught, unequal.advantages, 0.0).astype(np.float32)
    scored = eqx.tree_at(lambda s: s.advantages, unequal, advantages)
    settings = ("grpo.beta=0.0", "grpo.weight_decay=0.1")
    monkeypatch.setattr(_step, "plan_micro_batches", undivided)
    momentum = 0.0 if taught else 0.1
    weights, features, batch, metrics = updated(tiny_folder, tmp_path, scored, *settings, momentum=momentum)
    plans, backwards = [], []

    def record(lengths, width, **kwargs):
        plans.append(plan_micro_batches(lengths, width, **(kwargs | dict(overhead=0))))
        return plans[-1]

    def count(*args, **kwargs):
        backwards.append(args[1])
        return policy_gradients(*args, **kwargs)

    monkeypatch.setattr(_step, "SMALL_HIDDEN_SIZE", 0)
    monkeypatch.setattr(_step, "plan_micro_batches", record)
    monkeypatch.setattr(_step, "policy_gradients", count)
    other, other_features, _, other_metrics = updated(tiny_folder, tmp_path, scored, *settings, momentum=momentum)
    assert not all(part.has_gradient for part in plans[-1])
    learning = [row for part in plans[-1] if part.has_gradient for row in part.rows]
    assert set(np.flatnonzero(advantages)) <= set(learning)
    assert sum(len(batch.advantages) for batch in backwards) == len(learning)

    start = flat(eqx.filter(tiny_model(), eqx.is_inexact_array))
    assert np.linalg.norm(weights - start) > 1e-2, "momentum and decay go on whatever there is to learn"
    if taught == 0:
        np.testing.assert_array_equal(other, weights)
    assert np.linalg.norm(other - weights) < 1e-2 * np.linalg.norm(weights - start)
    ends = batch.prompt_lengths + scored.rollouts.lengths
    valid = np.arange(batch.tokens.shape[1])[None] < ends[:, None]
    np.testing.assert_allclose(other_features[valid], features[valid], atol=1e-4)
    assert other_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert other_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def counting_model(vocab_size: int = 24):
    """After token `t` mostly comes `t + 1`, which a fresh head, repeating the target's own prediction, gets wrong."""
    model = tiny_model(vocab_size)
    embedding = jnp.eye(vocab_size, model.hidden_size)
    where = lambda m: [w for b in m.blocks for w in (b.attention.output.weight, b.mlp.down.weight)]
    # A little of the random layers is left, so that the heads' task is not exactly linear.
    model = eqx.tree_at(where, model, replace_fn=lambda weight: 0.1 * weight)
    return eqx.tree_at(lambda m: (m.embedding, m.unembedding), model, (embedding, jnp.roll(embedding, 1, axis=0)))


def test_training_raises_acceptance():
    """On samples that were not trained on: as expected from the distributions, and as measured by the decoder."""
    model = counting_model()
    prompts = [[5, 9, 11], [7, 3, 2, 8, 1], [20, 21], [3, 2, 14, 12]]

    def roll_out(draft, seed):
        return decode(
            model, prompts, draft=draft, sampling=Sampling(jnp.float32(TEMPERATURE)), key=jr.key(seed),
            max_new_tokens=24, samples=8, smallest_bucket=32,
        )  # fmt: skip

    def draft_batch(rollouts):
        update = make_update_batch(rollouts, np.zeros(len(rollouts.group), np.float32))
        return DraftBatch(
            features_of(model, update, ()).features,
            jnp.asarray(update.tokens),
            jnp.asarray(update.prompt_lengths),
            jnp.asarray(rollouts.lengths),
        )

    draft = MedusaHeads.fresh(model.hidden_size, HEADS)
    untrained = roll_out(draft, 0)
    batch, held_out = draft_batch(untrained), draft_batch(roll_out(draft, 1))
    optimizer = adamw(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    state = optimizer.init(eqx.filter(draft, eqx.is_inexact_array))
    first = gradients_of(draft, model, held_out, chunk=64, new=24)
    for _ in range(100):
        result = gradients_of(draft, model, batch, chunk=64, new=24)
        draft, state = apply_gradients((optimizer, result.gradients, jnp.float32(1e-2)), draft, state)
    last = gradients_of(draft, model, held_out, chunk=64, new=24)
    trained = roll_out(draft, 2)
    assert untrained.statistics.acceptance_length < 1.2 and trained.statistics.acceptance_length > 2.5
    assert float(last.loss) < 0.2 * float(first.loss)
    assert (np.asarray(first.acceptance) < 0.1).all() and (np.asarray(last.acceptance) > 0.7).all()
    # What distillation expects of the first head is what verification finds.
    assert abs(trained.statistics.acceptance_rate_by_position[0] - float(last.acceptance[0])) < 0.1
