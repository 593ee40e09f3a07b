"""Truncated sampling that stays unbiased: what is kept is recorded with each token, and the loss normalises over it."""

import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import LOSSLESS, TabularDraft, quick_compilation, tabular_model
from rich.console import Console
from tiny_run import tiny_config, tiny_folder as tiny_folder, tiny_model

from eqx_specgrpo import train
from eqx_specgrpo._types import Rollouts, Support
from eqx_specgrpo.decoding import Block, Coupled, FixedLength, Sampling, TruncatedSampling, decode
from eqx_specgrpo.decoding._support import support_of
from eqx_specgrpo.distill._truncated import truncated_acceptance
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.grpo import LossSettings, chunked_logprobs, make_update_batch, policy_entropies, policy_logprobs
from eqx_specgrpo.records import read_records
from eqx_specgrpo.testing import ConformanceError, OneOf, check_truncation
from eqx_specgrpo.testing._enumerate import enumerate_rounds
from eqx_specgrpo.testing._situations import VOCAB, joint_law, random_tree

NUCLEUS = dict(max_support=5, top_p=0.9)
OPTIONS: dict[str, dict[str, Any]] = {
    "top-p": dict(max_support=4, top_p=0.7),
    "top-k": dict(max_support=4, top_k=2),
    "min-p": dict(max_support=4, min_p=0.4),
    "all three": dict(max_support=4, top_k=3, top_p=0.8, min_p=0.2),
    "the bound alone": dict(max_support=2, top_p=0.95),
}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def kept_by_hand(
    logits: np.ndarray,
    temperature: float = 1.0,
    *,
    max_support: int,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> list[int]:
    """The ids kept of one position's logits, likeliest first, in float64."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    ids = [int(i) for i in np.argsort(-weights, kind="stable") if weights[i] > 0]
    ids = ids[:top_k]
    if top_p is not None:
        shares = weights[ids] / weights[ids].sum()
        ids = ids[: int(np.argmax(np.cumsum(shares) >= top_p - 1e-9)) + 1]
    if min_p is not None:
        ids = [i for i in ids if weights[i] >= min_p * weights[ids[0]] * (1 - 1e-9)]
    return ids[:max_support]


@eqx.filter_jit
def drawn_from(sampling, logits):
    """What is recorded, and the probabilities of all tokens."""
    distribution = sampling.distribution(logits)
    return support_of(distribution), distribution.dense(logits.shape[-1]), distribution.log_normalizer


@eqx.filter_jit
def probs_of(sampling, logits):
    return sampling.distribution(logits).dense(logits.shape[-1]).probs()


def recorded(support: Support | None, *index: int) -> list[int]:
    assert support is not None
    return np.asarray(support.ids)[index][: int(np.asarray(support.counts)[index])].tolist()


#
# What is kept
#


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_kept(options, temperature):
    logits = 2 * np.random.default_rng(0).standard_normal((3, 40, 11)).astype(np.float32)
    logits[0, 0, [2, 5]] = -np.inf
    sampling = TruncatedSampling(temperature, **options)
    support, dense = drawn_from(sampling, logits)[0], np.asarray(probs_of(sampling, logits))
    for place in np.ndindex(3, 40):
        expected = kept_by_hand(logits[place], temperature, **options)
        assert recorded(support, *place) == expected
        assert np.flatnonzero(dense[place]).tolist() == sorted(expected)
        weights = np.exp((logits[place][expected].astype(np.float64) - logits[place].max()) / temperature)
        np.testing.assert_allclose(dense[place][expected], weights / weights.sum(), rtol=1e-5)


def test_without_the_bound_it_is_what_others_keep():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((50, 23)), jnp.float32)
    for options in (dict(top_p=0.8), dict(top_k=6), dict(min_p=0.3), dict(top_k=9, top_p=0.7, min_p=0.1)):
        bounded = probs_of(TruncatedSampling(0.7, max_support=23, **options), logits)
        np.testing.assert_allclose(bounded, probs_of(Sampling(0.7, **options), logits), atol=1e-6)


def test_of_equals_no_more_than_the_bound_are_kept():
    logits = jnp.zeros((1, 9))
    for options in (dict(max_support=3, top_p=0.9), dict(max_support=4, top_k=3), dict(max_support=3, min_p=1.0)):
        support, dense, _ = drawn_from(TruncatedSampling(**options), logits)
        assert recorded(support, 0) == [0, 1, 2]
        np.testing.assert_allclose(dense.logits[0, :3] - dense.log_normalizer[0], -np.log(3), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_distribution_are_noticed(value):
    logits = np.full(12, value, np.float32) if value == -np.inf else np.arange(12, dtype=np.float32)
    logits[3] = value
    assert not np.isfinite(drawn_from(TruncatedSampling(0.7, **NUCLEUS), logits)[2])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_support=0), "max_support is 0, but at least 1 token"),
        (dict(max_support=4, top_k=0), "top_k is 0, but must be at least 1"),
        (dict(max_support=4, top_k=5), "top_k is 5, but at most 4 tokens are kept"),
        (dict(max_support=4, top_p=0.0), "top_p is 0.0, but must be above 0"),
        (dict(max_support=4, min_p=1.5), "min_p is 1.5, but must be above 0 and at most 1"),
    ],
)
def test_settings_out_of_range_get_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        TruncatedSampling(**options)


#
# The law
#


def test_the_law_of_every_rule_is_that_of_the_recorded_tokens():
    """Enumerated, target and draft truncated alike: against the untruncated logits, restricted to what is recorded."""
    length, rng = 2, np.random.default_rng(0)
    target, draft = ([np.repeat(x, len(OPTIONS), 0) for x in random_tree(rng, VOCAB[2], 3, 1.0)] for _ in range(2))
    samplings = [TruncatedSampling(1.2, **options) for options in OPTIONS.values()]
    kept_target, kept_draft, expected = [], [], []
    for target_logits, draft_logits in zip(target, draft, strict=True):
        parts = [drawn_from(s, x) for s, x in zip(samplings, target_logits, strict=True)]
        kept_target.append(np.stack([part[1].logits for part in parts]))
        restricted = np.full(target_logits.shape, -np.inf, np.float32)
        for case, (support, *_) in enumerate(parts):
            for place in np.ndindex(target_logits.shape[1:-1]):
                ids = recorded(support, *place)
                restricted[(case, *place, ids)] = target_logits[(case, *place, ids)] / 1.2
        expected.append(restricted)
        drafted = [drawn_from(s, x)[1] for s, x in zip(samplings, draft_logits, strict=True)]
        kept_draft.append(np.stack([part.logits for part in drafted]))
    law, rules = joint_law(expected, length + 1), tuple(LOSSLESS)
    assert 0.2 < np.mean(law == 0) < 0.98
    for index in range(len(rules)):
        outcome = enumerate_rounds(OneOf(rules, index), kept_target, kept_draft, length, tuple(OPTIONS))
        np.testing.assert_allclose(outcome.law, law, atol=1e-6)
    assert np.abs(joint_law(target, length + 1) - law).max() > 0.01, "the whole law would be noticed"


VOCABULARY = 13
TABLE = tabular_model(seed=0, vocab=VOCABULARY, scale=1.5)
DRAFT = TabularDraft(TABLE.table[0] + np.random.default_rng(1).standard_normal((13, 13)).astype(np.float32), 2)
PROMPTS = [[3, 1], [5, 2, 7], [8]]


def rollouts_of_the_table(sampling, **options: Any) -> Rollouts:
    defaults = dict(draft=DRAFT, verifier=Block(), length=FixedLength(2), samples=6, smallest_bucket=32, eos_ids=[0])
    return decode(TABLE, PROMPTS, sampling=sampling, key=jr.key(3), max_new_tokens=20, **defaults | options)


def assert_recorded_by_hand(rollouts: Rollouts, temperature: float, options: dict[str, Any]) -> None:
    assert rollouts.support is not None and rollouts.support.ids.shape[-1] <= options["max_support"]
    table = np.asarray(TABLE.table)
    for row, prompt in enumerate(rollouts.group):
        tokens = [*PROMPTS[prompt], *rollouts.completion(row)]
        start, length = len(PROMPTS[prompt]), int(rollouts.lengths[row])
        for position in range(length):
            end = start + position
            before = tokens[end - 2] if end > 1 else VOCABULARY
            logits = table[before, tokens[end - 1]]
            kept = kept_by_hand(logits, temperature, **options)
            assert recorded(rollouts.support, row, position) == kept and tokens[end] in kept
            weights = np.exp((logits[kept].astype(np.float64) - logits.max()) / temperature)
            expected = np.log(weights[kept.index(tokens[end])] / weights.sum())
            np.testing.assert_allclose(rollouts.logprobs[row, position], expected, atol=1e-5)
        assert not np.asarray(rollouts.support.counts)[row, length:].any()


@pytest.mark.parametrize("verifier", [Block(), Coupled()], ids=["block", "coupled"])
def test_each_token_has_the_set_that_it_was_drawn_from(verifier):
    options = dict(max_support=5, top_p=0.85, min_p=0.05)
    rollouts = rollouts_of_the_table(TruncatedSampling(0.9, **options), verifier=verifier)
    assert_recorded_by_hand(rollouts, 0.9, options)
    assert rollouts.support is not None
    counts = np.asarray(rollouts.support.counts)
    assert rollouts.lengths.sum() > 60 and counts.min() == 0 and counts.max() == 5
    assert 0.05 < rollouts.statistics.acceptance_rate < 0.95
    if isinstance(verifier, Coupled):
        plain = rollouts_of_the_table(TruncatedSampling(0.9, **options), verifier=verifier, draft=None)
        np.testing.assert_array_equal(plain.tokens, rollouts.tokens)


def test_rows_take_their_sets_along_when_they_move():
    """Refilled in any order, and shrunk to the last row."""
    options = dict(max_support=5, top_p=0.85, min_p=0.05)
    moving = dict(max_rows=3, expected_lengths=[1.0, 9.0, np.nan], smallest_bucket=1)
    rollouts = rollouts_of_the_table(TruncatedSampling(0.9, **options), **moving)
    assert_recorded_by_hand(rollouts, 0.9, options)


def test_plain_sampling_records_nothing():
    assert rollouts_of_the_table(Sampling(1.0, top_p=0.9), samples=1).support is None


#
# The loss
#


def dense_loss(hidden, weight, tokens, kept, temperature):
    """Log-probabilities and entropies over the kept tokens, from whole logits and a mask."""
    logits = jnp.where(kept, hidden @ weight / temperature, -jnp.inf)
    logits = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    finite = jnp.where(kept, logits, 0.0)
    return finite[jnp.arange(len(tokens)), tokens], -jnp.sum(jnp.where(kept, jnp.exp(finite) * finite, 0.0), axis=-1)


def test_values_and_gradients_over_the_kept_tokens():
    """By chunks that do not divide the positions, with padding, whose support is empty."""
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((11, 6), (6, 19)))
    counts = np.array([1, 4, 2, 4, 3, 0, 4, 1, 2, 3, 0], np.int32)
    ids = np.stack([rng.permutation(19)[:4] for _ in range(11)]).astype(np.int32)
    tokens = np.array([row[max(count - 1, 0)] for row, count in zip(ids, counts, strict=True)], np.int32)
    kept = np.zeros((11, 19), bool)
    for row, count in enumerate(counts):
        kept[row, ids[row, : max(count, 1)]] = True
    weights = jnp.asarray(np.where(counts > 0, rng.standard_normal(11), 0.0), jnp.float32)
    support = Support(jnp.asarray(ids), jnp.asarray(counts))

    def ours(hidden, weight):
        logprobs, entropies = chunked_logprobs(
            hidden, jnp.asarray(tokens), lambda h: h @ weight, 0.6, 4, differentiable_entropy=True, support=support
        )
        return jnp.sum(weights * (logprobs + 0.3 * entropies)), (logprobs, entropies)

    def theirs(hidden, weight):
        logprobs, entropies = dense_loss(hidden, weight, tokens, kept, 0.6)
        return jnp.sum(weights * (logprobs + 0.3 * entropies)), (logprobs, entropies)

    (value, found), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, weight)
    (expected_value, expected), expected_gradients = jax.value_and_grad(theirs, argnums=(0, 1), has_aux=True)(
        hidden, weight
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for some, others in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(some)[counts > 0], np.asarray(others)[counts > 0], atol=1e-5)
    for some, others in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(some, others, atol=1e-5)
    outside = jnp.asarray((tokens + 1) % 19).at[0].set(int(ids[0, 1]))
    values, _ = chunked_logprobs(hidden, outside, lambda h: h @ weight, 0.6, 4, support=support)
    assert values[0] == -jnp.inf, "what is not among the first `count` ids has no probability"


def test_the_value_of_the_reference():
    """anchors-2026-11, section 2.3: p = [.5, .3, .15, .05] and top-p .8 make the first token's .625 instead of .5."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    support = support_of(TruncatedSampling(max_support=4, top_p=0.8).distribution(logits))
    assert recorded(support, 0) == [0, 1]
    token = jnp.array([0])
    over_kept, _ = chunked_logprobs(logits, token, lambda x: x, 1.0, 1, support=support)
    naive, _ = chunked_logprobs(logits, token, lambda x: x, 1.0, 1)
    np.testing.assert_allclose([over_kept[0], naive[0]], [-0.4700, -0.6931], atol=1e-4)


@pytest.fixture(scope="module")
def batch():
    """Rollouts of a tiny model under top_p = 0.9, decoded speculatively."""
    heads = MedusaHeads(0.1 * jr.normal(jr.key(1), (3, 32, 32)), 0.3 * jr.normal(jr.key(2), (3, 32)))
    rollouts = decode(
        tiny_model(67),
        [[5, 9, 11], [7, 3, 2, 8, 1, 30, 31]],
        draft=heads,
        sampling=TruncatedSampling(0.7, max_support=32, top_p=0.9),
        key=jr.key(3),
        max_new_tokens=20,
        eos_ids=range(60, 67),
        samples=4,
        smallest_bucket=8,
    )
    assert rollouts.lengths.sum() > 60
    return make_update_batch(rollouts, np.ones(8, np.float32))


SETTINGS = LossSettings(temperature=0.7, chunk=27)


def test_the_first_inner_steps_ratios_are_1(batch):
    """To 1e-5; and normalised over the whole vocabulary, as a loss does that knows nothing of the truncation, not."""
    mask, model = batch.completion_mask, tiny_model(67)
    ratios = np.exp(np.asarray(policy_logprobs(model, batch, SETTINGS)) - batch.old_logprobs)[mask]
    np.testing.assert_allclose(ratios, 1.0, atol=1e-5)
    naive = eqx.tree_at(lambda b: b.support, batch, None, is_leaf=lambda x: x is batch.support)
    naive_ratios = np.exp(np.asarray(policy_logprobs(model, naive, SETTINGS)) - batch.old_logprobs)[mask]
    assert naive_ratios.max() < 1.0 and naive_ratios.mean() < 0.97, "tokens would look less likely than they were"


def test_the_entropy_is_that_of_what_was_drawn_from(batch):
    entropies = np.asarray(policy_entropies(tiny_model(67), batch, SETTINGS))[batch.completion_mask]
    counts = np.asarray(batch.support.counts)[batch.completion_mask]
    assert (entropies <= np.log(counts) + 1e-5).all() and entropies.max() > 0.5
    assert np.abs(entropies[counts == 1]).max(initial=0.0) < 1e-6


def test_micro_batches_take_their_sets_along(batch):
    part = batch.rows(np.array([6, 1]), 7)
    assert part.support.ids.shape == (2, 7, 32) and part.support.counts.shape == (2, 7)
    np.testing.assert_array_equal(part.support.ids, batch.support.ids[[6, 1], :7])


#
# The draft's lessons
#


def test_the_acceptance_that_a_lesson_reports_is_that_of_what_is_drawn():
    rng, truncation = np.random.default_rng(0), TruncatedSampling(0.8, max_support=4, top_p=0.8)
    target, draft = rng.standard_normal((7, 9)).astype(np.float32), rng.standard_normal((5, 2, 9)).astype(np.float32)

    def law(logits: np.ndarray) -> np.ndarray:
        kept, probs = kept_by_hand(logits, 0.8, max_support=4, top_p=0.8), np.zeros(9)
        probs[kept] = np.exp(logits[kept].astype(np.float64) / 0.8)
        return probs / probs.sum()

    def by_hand(law_of_draft) -> list[list[float]]:
        return [
            [np.minimum(law(target[i + 1 + k]), law_of_draft(draft[i, k])).sum() for k in range(2)] for i in range(5)
        ]

    found = truncated_acceptance(jnp.asarray(target), jnp.asarray(draft), truncation, None)
    np.testing.assert_allclose(found, by_hand(law), atol=1e-5)
    # The same of a draft that can say all tokens but the first two, in an order of its own.
    few = np.array([8, 2, 3, 7, 5, 4, 6], np.int32)
    found = truncated_acceptance(jnp.asarray(target), jnp.asarray(draft[:, :, few]), truncation, jnp.asarray(few))
    without = np.where(np.isin(np.arange(9), few), 0, -np.inf).astype(np.float32)
    np.testing.assert_allclose(found, by_hand(lambda logits: law(logits + without)), atol=1e-5)
    # A draft that is equal to the target is always accepted: both keep the same tokens.
    same = np.stack([target[1:6], target[2:7]], axis=1)
    np.testing.assert_allclose(
        truncated_acceptance(jnp.asarray(target), jnp.asarray(same), truncation, None), 1.0, atol=1e-5
    )


#
# A whole run, and the certificate
#


def test_a_run_with_all_of_it(tiny_folder, tmp_path):
    """Two inner iterations, a reference, micro-batches, a draft of a reduced vocabulary with fitted temperatures."""
    settings = ("grpo.top_p=0.9", "grpo.min_p=0.01", "grpo.max_support=200", "grpo.beta=0.1", "grpo.num_iterations=2")
    draft = ("draft.vocabulary=40", "draft.fit_temperature=true", "draft.warmup=1")
    config = tiny_config(tiny_folder, tmp_path / "run", "steps=2", "compare=false", *settings, *draft)
    train.run(config, console=Console(file=io.StringIO()))
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    for record in records:
        assert record["sampling/sampling_logp_difference/max"] < 1e-4
        assert 1 < record["sampling/support_size/mean"] < record["sampling/support_size/max"] <= 200
        assert 0 <= record["sampling/support_full"] < 1
        assert 0 < record["entropy"] < np.log(200)
        assert 0 <= record["draft/expected_acceptance_pos_0"] <= 1
        assert record["kl"] > 0  # of the second inner iteration


def test_the_certificate_sees_what_is_recorded(monkeypatch):
    target, heads = tiny_model(67), MedusaHeads.fresh(32, 2)
    prompts = [[5, 9, 11], [7, 3, 2, 8]]
    options = dict(key=jr.key(0), max_new_tokens=12, length=2, max_support=16)
    report = check_truncation(heads, target, prompts, **options)
    assert report.tokens == 24 and report.edge < 1e-3 and report.logprob_gap < 1e-4
    assert 1 < report.kept_mean < report.kept_max <= 16
    assert "24 tokens, each of" in report.summary()

    real = TruncatedSampling.distribution

    def one_too_few(self, logits):
        kept = real(self, logits)
        counts = jnp.sum(kept.logits > -jnp.inf, axis=-1, keepdims=True)
        place = jnp.broadcast_to(jnp.arange(kept.logits.shape[-1]), kept.logits.shape)
        beyond = place >= jnp.maximum(counts - 1, 1)
        return eqx.tree_at(lambda c: c.logits, kept, jnp.where(beyond, -jnp.inf, kept.logits))

    monkeypatch.setattr(TruncatedSampling, "distribution", one_too_few)
    with pytest.raises(ConformanceError, match="not those that top_p = 0.9 keeps in a fresh forward"):
        check_truncation(heads, target, prompts, **options | {"max_new_tokens": 13})
