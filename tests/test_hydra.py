"""Sequential heads: what they are told about the tokens before, in training and in decoding, is the same."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import normalized, quick_compilation, randomise, tiny_transformer

from eqx_specgrpo.decoding import Block, FixedLength, decode, teacher_forced_logprobs
from eqx_specgrpo.drafts import DraftError, HydraHeads, IndependentSampler, load_draft, save_draft
from eqx_specgrpo.models import sequence_features
from eqx_specgrpo.sampling import GreedySampling, Sampling

HIDDEN, HEADS = 16, 3


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def target():
    return tiny_transformer(num_layers=1)


@pytest.fixture(scope="module")
def heads():
    return randomise(HydraHeads(HIDDEN, HEADS, 24, key=jr.key(0)), 0, 0.3)


def test_fresh_heads_repeat_the_targets_own_prediction(target):
    fresh = HydraHeads(HIDDEN, HEADS, key=jr.key(1))
    tokens = jr.randint(jr.key(2), (2, 8), 0, target.vocab_size)
    features = sequence_features(target, tokens)
    hidden = fresh.train_hidden(target, features, tokens)
    np.testing.assert_array_equal(hidden, np.repeat(np.asarray(features.last)[:, :, None], HEADS, axis=2))


def test_training_conditions_on_the_tokens_that_decoding_drafts(target, heads):
    """A sequence is continued by what was drafted from position `i`: training there sees the very distributions."""
    rows, i = 6, 4
    tokens = np.array(jr.randint(jr.key(3), (rows, i + 2 + HEADS), 0, target.vocab_size), np.int32)
    state = sequence_features(target, jnp.asarray(tokens[:, : i + 1])).last[:, i]
    sampler = IndependentSampler(Sampling(1.0), jr.split(jr.key(4), rows))
    proposal, _ = heads.propose(target, state, jnp.asarray(tokens[:, i + 1]), sampler, HEADS)
    tokens[:, i + 2 :] = proposal.tokens
    features = sequence_features(target, jnp.asarray(tokens))
    trained = heads.train_logits(target, heads.train_hidden(target, features, jnp.asarray(tokens)))[:, i]
    np.testing.assert_allclose(normalized(proposal.distribution.logits), normalized(trained), atol=1e-4)
    # It does depend on them: with other tokens in the sequence the later heads say something else, the first does not.
    other = jnp.asarray(tokens).at[:, i + 2].add(1) % target.vocab_size
    changed = heads.train_logits(target, heads.train_hidden(target, features, other))[:, i]
    np.testing.assert_allclose(changed[:, 0], trained[:, 0], atol=1e-4)
    assert np.abs(changed[:, 1] - trained[:, 1]).max() > 1e-2


def test_fewer_tokens_are_the_first_of_more(target, heads):
    state = jr.normal(jr.key(5), (4, HIDDEN))
    last, keys = jnp.arange(4, dtype=jnp.int32), jr.split(jr.key(6), 4)
    few, _ = heads.propose(target, state, last, IndependentSampler(GreedySampling(), keys), 2)
    many, _ = heads.propose(target, state, last, IndependentSampler(GreedySampling(), keys), HEADS)
    np.testing.assert_array_equal(few.tokens, many.tokens[:, :2])


def test_decoding_is_lossless_with_them(target, heads):
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    settings = {"key": jr.key(7), "max_new_tokens": 17, "eos_ids": [2], "samples": 2}
    plain = decode(target, prompts, sampling=GreedySampling(), **settings)
    greedy = decode(target, prompts, draft=heads, sampling=GreedySampling(), **settings)
    np.testing.assert_array_equal(greedy.tokens, plain.tokens)
    np.testing.assert_array_equal(greedy.stop_reasons, plain.stop_reasons)

    sampled = decode(target, prompts, draft=heads, verifier=Block(), length=FixedLength(2), **settings)
    counts = np.arange(17)[None] < sampled.lengths[:, None]
    gap = np.abs(teacher_forced_logprobs(target, Sampling(1.0), sampled) - sampled.logprobs)[counts]
    assert gap.max() < 1e-5
    assert sampled.statistics.drafted[:, 2].sum() == 0 < sampled.statistics.accepted.sum()


def test_saved_heads_come_back_to_the_bit(target, heads, tmp_path):
    save_draft(tmp_path / "draft", heads, target, "tiny")
    assert eqx.tree_equal(load_draft(tmp_path / "draft", target), jax.tree.map(jnp.asarray, heads), typematch=True)


def test_heads_of_another_size_are_refused(target):
    with pytest.raises(DraftError, match="size 8.*size 16"):
        HydraHeads(8, 2, key=jr.key(0)).check(target)
