"""Draft temperatures: lossless whatever they are, fitted to what is accepted most, untouched by training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import normalized, quick_compilation, randomise, tiny_transformer

from eqx_specgrpo.decoding import Block, Coupled, FixedLength, Rejection, Sampling, decode
from eqx_specgrpo.distill import DraftBatch, fit_temperature
from eqx_specgrpo.drafts import (
    MOST_STEPS,
    FallbackDraft,
    IndependentSampler,
    MedusaHeads,
    ModelDraft,
    NGramDraft,
    ReducedVocabulary,
    TemperedDraft,
    describe_saved_draft,
    load_draft,
    save_draft,
    tempered_part,
    with_vocabulary,
)
from eqx_specgrpo.models import cast_weights, sequence_features
from eqx_specgrpo.testing import check_draft
from eqx_specgrpo.testing._enumerate import enumerate_rounds
from eqx_specgrpo.testing._situations import random_tree

HIDDEN, VOCAB, LENGTH = 16, 13, 3
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
STEPS = jnp.array([-11, 0, 20], jnp.int32)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


TARGET = tiny_transformer()
HEADS = randomise(MedusaHeads.fresh(HIDDEN, LENGTH), 0, 0.3)


def propose(draft, rows=30):
    features = jnp.asarray(np.random.default_rng(0).standard_normal((rows, HIDDEN)), jnp.float32)
    sampler = IndependentSampler(Sampling(0.7), jr.split(jr.key(0), rows))
    return draft.propose(TARGET, features, jnp.zeros(rows, jnp.int32), sampler, LENGTH)[0]


#
# Lossless
#


def test_logits_are_divided_position_by_position():
    plain, tempered = propose(HEADS), propose(TemperedDraft(HEADS, STEPS))
    temperature = 2.0 ** (np.array([-11, 0, 20]) / 16)
    expected = normalized(np.asarray(plain.distribution.logits) / temperature[None, :, None])
    np.testing.assert_allclose(normalized(tempered.distribution.logits), expected, rtol=1e-5, atol=1e-6)
    logprobs = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(expected)), np.asarray(tempered.tokens)[..., None], axis=-1
    )[..., 0]
    np.testing.assert_allclose(tempered.token_logprobs(), logprobs, atol=1e-4)
    np.testing.assert_allclose(propose(TemperedDraft(HEADS)).distribution.logits, plain.distribution.logits, rtol=1e-6)


@pytest.mark.parametrize("rule", [Rejection(), Block()], ids=["rejection", "block"])
def test_the_output_law_is_the_targets(rule):
    """Enumerated; the draft is the target itself, each position at a temperature of its own."""
    target = random_tree(np.random.default_rng(0), 4, 3, 2.0)
    draft = [logits / np.float32(temperature) for logits, temperature in zip(target, (0.5, 2.4, 1.0), strict=True)]
    outcome = enumerate_rounds(rule, target, draft, 2, ("tempered",))
    assert outcome.errors.max() < 1e-6 and outcome.accepted < 1.99


def test_the_whole_certificate():
    """Tokens are draws from what comes with them; coupled and greedy decoding, gradients, saving."""
    check_draft(TemperedDraft(HEADS, STEPS), TARGET)


def test_tokens_are_those_of_plain_decoding():
    def tokens(draft):
        return decode(
            TARGET, PROMPTS, draft=draft, verifier=Coupled(), length=FixedLength(LENGTH), key=jr.key(9),
            max_new_tokens=20, samples=4, smallest_bucket=12,
        )  # fmt: skip

    draft = FallbackDraft(
        NGramDraft(LENGTH), TemperedDraft(with_vocabulary(HEADS, ReducedVocabulary([3, 0, 12, 7])), STEPS)
    )
    found, plain = tokens(draft), tokens(None)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert found.statistics.accepted.sum() > 0


def test_saved_and_loaded(tmp_path):
    inner = TemperedDraft(with_vocabulary(HEADS, ReducedVocabulary([3, 0, 12])), STEPS)
    for name, draft in {"alone": inner, "behind": FallbackDraft(NGramDraft(LENGTH), inner)}.items():
        save_draft(tmp_path / name, draft, TARGET, "tiny")
        assert eqx.tree_equal(load_draft(tmp_path / name, TARGET), draft)
        about = describe_saved_draft(tmp_path / name)
        assert (about["kind"], about["max_length"], about["ngram"]) == ("medusa", LENGTH, name == "behind")


def test_it_is_neither_trained_nor_cast():
    draft = cast_weights(TemperedDraft(HEADS, STEPS), jnp.bfloat16)
    assert len(jax.tree.leaves(eqx.filter(draft, eqx.is_inexact_array))) == 2
    np.testing.assert_allclose(draft.temperature, 2.0 ** (np.array([-11, 0, 20]) / 16), rtol=1e-6)


#
# Fitted
#


@eqx.filter_jit
def target_batch():
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (3, 14), np.int32))
    return DraftBatch(sequence_features(TARGET, tokens), tokens, jnp.array([3, 4, 5]), jnp.array([11, 8, 6]))


def fitted(draft, batch, rounds=12, **changes):
    fits = []
    settings = dict(temperature=jnp.float32(0.8), new=11, positions=64, chunk=8) | changes
    for _ in range(rounds):
        draft, fit = fit_temperature(draft, TARGET, batch, **settings)
        fits.append(fit)
    return draft, fits


def test_a_known_temperature_is_recovered():
    """The draft is the target itself with logits too small, right, and too large."""
    batch = target_batch()
    for factor in (0.5, 1.0, 2.2):
        unembedding = factor * TARGET.unembedding
        model = eqx.tree_at(lambda m: m.unembedding, TARGET, unembedding)
        draft, fits = fitted(TemperedDraft(ModelDraft(model, LENGTH)), batch)
        # A logit that is `factor` times too large wants a temperature of `factor`.
        np.testing.assert_allclose(draft.temperature, np.full(LENGTH, factor), rtol=0.03)
        assert fits[-1].after[0] > 0.98 and (factor == 1 or fits[0].before[0] < 0.9)


def expected(draft, batch):
    """Expected acceptance by draft position over all that counts, in numpy."""
    hidden = draft.train_hidden(TARGET, batch.features, batch.tokens)
    logits = draft.train_logits(TARGET, hidden) / draft.temperature[None, None, :, None]
    q = np.asarray(jax.nn.softmax(logits / 0.8))
    p = np.asarray(jax.nn.softmax(TARGET.unembed(batch.features.last) / 0.8))
    result = []
    for offset in range(LENGTH):
        overlaps = [
            np.minimum(p[row, prompt + place + offset], q[row, prompt - 1 + place, offset]).sum()
            for row, (prompt, new) in enumerate(zip((3, 4, 5), (11, 8, 6), strict=True))
            for place in range(11)
            if place + 1 + offset < new
        ]
        result.append(np.mean(overlaps))
    return np.array(result)


def test_no_step_lowers_the_expected_acceptance():
    batch = target_batch()
    for start in (STEPS, jnp.array([MOST_STEPS, -MOST_STEPS, 3], jnp.int32)):
        draft = TemperedDraft(HEADS, start)
        for _ in range(4):
            before = expected(draft, batch)
            draft, (fit,) = fitted(draft, batch, rounds=1)
            after = expected(draft, batch)
            np.testing.assert_allclose(fit.before, before, atol=1e-5)
            np.testing.assert_allclose(fit.after, after, atol=1e-5)
            assert (after >= before - 1e-6).all()
            assert np.abs(draft.steps).max() <= MOST_STEPS
    assert (after > expected(TemperedDraft(HEADS, start), batch)).any()


def test_a_part_of_the_positions_is_enough_to_know_the_direction():
    batch = target_batch()
    start = TemperedDraft(HEADS, jnp.array([-32, -32, -32], jnp.int32))
    for positions in (8, 10_000):
        draft, (fit,) = fitted(start, batch, rounds=1, positions=positions)
        assert draft.steps.tolist() == [-28, -28, -28]


def test_completions_too_short_to_draft_in_change_nothing():
    batch = eqx.tree_at(lambda b: b.completion_lengths, target_batch(), jnp.array([1, 1, 1]))
    draft, (fit,) = fitted(TemperedDraft(HEADS, STEPS), batch, rounds=1)
    assert draft.steps.tolist() == STEPS.tolist() and not fit.after.any()


def test_a_reduced_vocabulary_and_a_draft_deep_inside():
    """The acceptance is the target's unrenormalised; the lookup in front of the draft is left as it is."""
    batch, order = target_batch(), np.random.default_rng(0).permutation(VOCAB)
    whole, (fit,) = fitted(TemperedDraft(HEADS, STEPS), batch, rounds=1)
    permuted = FallbackDraft(NGramDraft(LENGTH), TemperedDraft(with_vocabulary(HEADS, ReducedVocabulary(order)), STEPS))
    permuted, (found,) = fitted(permuted, batch, rounds=1)
    assert tempered_part(permuted).steps.tolist() == whole.steps.tolist()
    np.testing.assert_allclose(found.after, fit.after, atol=1e-5)
    few, (found,) = fitted(TemperedDraft(with_vocabulary(HEADS, ReducedVocabulary([2])), STEPS), batch, rounds=1)
    p = np.asarray(jax.nn.softmax(TARGET.unembed(batch.features.last) / 0.8))[..., 2]
    covered = [p[row, prompt : prompt + new - 1] for row, (prompt, new) in enumerate(((3, 11), (4, 8), (5, 6)))]
    np.testing.assert_allclose(found.after[0], np.concatenate(covered).mean(), atol=1e-5)


def test_impossible_fits():
    with pytest.raises(ValueError, match="MedusaHeads has no temperatures"):
        fit_temperature(HEADS, TARGET, target_batch(), temperature=jnp.float32(1), new=11)
    with pytest.raises(ValueError, match="3 positions ahead: give one for each"):
        TemperedDraft(HEADS, jnp.zeros(2, jnp.int32))
