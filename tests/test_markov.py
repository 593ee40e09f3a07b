"""Parallel heads with a low-rank term: what they are told of the tokens before is the same in training and decoding."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import normalized, quick_compilation, randomise, tiny_transformer
from jax import lax

from eqx_specgrpo.decoding import Block, FixedLength, decode, teacher_forced_logprobs
from eqx_specgrpo.distill import DraftBatch, ForwardKL, draft_gradients
from eqx_specgrpo.distill._losses import confidence_loss
from eqx_specgrpo.drafts import (
    DraftError,
    FallbackDraft,
    IndependentSampler,
    MarkovHeads,
    NGramDraft,
    ReducedVocabulary,
    load_draft,
    save_draft,
)
from eqx_specgrpo.drafts._confidence import ConfidenceHead, NoConfidence
from eqx_specgrpo.models import Features, sequence_features
from eqx_specgrpo.sampling import GreedySampling, Sampling

HIDDEN, HEADS, RANK = 16, 3, 4


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def target():
    return tiny_transformer(num_layers=1)


@pytest.fixture(scope="module")
def heads():
    return randomise(MarkovHeads(HIDDEN, HEADS, RANK, key=jr.key(0)), 0, 0.3)


def test_fresh_heads_repeat_the_targets_own_prediction(target):
    fresh = MarkovHeads(HIDDEN, HEADS, key=jr.key(1))
    tokens = jr.randint(jr.key(2), (2, 8), 0, target.vocab_size)
    features = sequence_features(target, tokens)
    logits = fresh.train_logits(target, fresh.train_hidden(target, features, tokens))
    own = np.repeat(np.asarray(target.unembed(features.last))[:, :, None], HEADS, axis=2)
    np.testing.assert_allclose(logits, own, atol=1e-5)


def test_every_weight_of_fresh_heads_learns(target):
    """But those of `D` and `C`, behind directions that are zero: they do as soon as these are not."""
    tokens = jr.randint(jr.key(2), (2, 8), 0, target.vocab_size)
    features = sequence_features(target, tokens)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(heads):
        logits = heads.train_logits(target, heads.train_hidden(target, features, tokens))
        return jnp.sum(jax.nn.log_softmax(logits)[..., 0])

    def moved(heads) -> set[str]:
        gradients = gradient(heads)
        return {name for name, pick in WEIGHTS.items() if np.abs(pick(gradients)).max() > 0}

    fresh = MarkovHeads(HIDDEN, HEADS, RANK, key=jr.key(1))
    assert moved(fresh) == {"weight", "bias", "directions"}
    directed = eqx.tree_at(lambda heads: heads.directions, fresh, jr.normal(jr.key(3), (RANK, HIDDEN)))
    assert moved(directed) == set(WEIGHTS)


WEIGHTS = {
    "weight": lambda heads: heads.weight,
    "bias": lambda heads: heads.bias,
    "token": lambda heads: heads.token.weight,
    "context": lambda heads: heads.context,
    "directions": lambda heads: heads.directions,
}


def test_what_a_drafted_token_changes_is_of_low_rank(target, heads):
    """In the same place, with every token before it: the logits of a head differ by at most `RANK` directions."""
    vocab = target.vocab_size
    tokens = jnp.tile(jr.randint(jr.key(2), (1, 8), 0, vocab), (vocab, 1)).at[:, 4].set(jnp.arange(vocab))
    features = sequence_features(target, jnp.tile(tokens[:1], (vocab, 1)))
    logits = heads.train_logits(target, heads.train_hidden(target, features, tokens))
    second = np.asarray(logits[:, 2, 1], np.float64)  # the token at 4 is the one before what it predicts
    sizes = np.linalg.svd(second - second.mean(0), compute_uv=False)
    assert sizes[RANK - 1] > 1e-3 * sizes[0] and sizes[RANK] < 1e-4 * sizes[0]
    np.testing.assert_allclose(logits[:, 2, 0], np.tile(logits[:1, 2, 0], (vocab, 1)), atol=1e-5)


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


def _confident(heads: MarkovHeads, seed: int = 5) -> MarkovHeads:
    """The same heads with a confidence of random weights."""
    fresh = ConfidenceHead(HEADS, HIDDEN)
    return eqx.tree_at(lambda h: h.confidence, heads, randomise(fresh, seed, 1.0), is_leaf=_is_confidence)


def _is_confidence(part) -> bool:
    return isinstance(part, NoConfidence)


def test_confidence_is_the_same_in_training_and_decoding(target, heads):
    confident, rows, i = _confident(heads), 3, 4
    tokens = jr.randint(jr.key(3), (rows, 8), 0, target.vocab_size)
    features = sequence_features(target, tokens)
    said = confident.expected_acceptance(target, features.last[:, i], tokens[:, i + 1], 2)
    trained = confident.train_confidence(confident.train_hidden(target, features, tokens)[:, i])
    np.testing.assert_allclose(said, jax.nn.sigmoid(trained[:, :2]), atol=1e-5)
    assert np.ptp(said) > 0.05
    assert heads.expected_acceptance(target, features.last[:, i], tokens[:, i + 1], 2) is None


def test_confidence_learns_the_acceptance_and_nothing_else_does(target, heads):
    """Its loss is least at the acceptance, and heads have the gradients that they have without it."""
    acceptance = jnp.array([0.1, 0.5, 0.9])
    slopes = jax.grad(lambda z: confidence_loss(z, acceptance).sum())
    np.testing.assert_allclose(slopes(jnp.log(acceptance / (1 - acceptance))), 0.0, atol=1e-6)
    np.testing.assert_allclose(slopes(jnp.zeros(3)), 0.5 - acceptance, atol=1e-6)

    tokens = jr.randint(jr.key(3), (2, 10), 0, target.vocab_size)
    lengths = jnp.array([2, 3], jnp.int32)
    batch = DraftBatch(sequence_features(target, tokens), tokens, lengths, 10 - lengths)
    settings = dict(temperature=jnp.ones(()), alpha=jnp.ones(HEADS), position_decay=jnp.ones(()), new=8, chunk=16)
    with_it, without = (draft_gradients(h, target, batch, ForwardKL(), **settings) for h in (_confident(heads), heads))
    for pick in WEIGHTS.values():
        np.testing.assert_allclose(pick(with_it.gradients), pick(without.gradients), atol=1e-6)
    assert min(np.abs(x).min() for x in jax.tree.leaves(with_it.gradients.confidence)) > 0
    assert with_it.loss > without.loss


def test_a_lookup_in_front_is_chosen_by_confidence(target, heads):
    """Known before anything is drawn: one row is sure of its guesses, and both have a match."""
    by_row = eqx.tree_at(lambda h: h.confidence.weight, _confident(heads), jnp.full((HEADS, HIDDEN), 100.0))
    by_row = eqx.tree_at(lambda h: h.confidence.bias, by_row, jnp.zeros(HEADS))
    draft = FallbackDraft(NGramDraft(HEADS, min_ngram=1, siblings=1, memory_size=0), by_row)
    tokens = jnp.array([[1, 2, 3, 1]] * 2, jnp.int32)
    features = sequence_features(target, tokens)
    last = jnp.array([2, 2], jnp.int32)
    signs = np.array([1.0, -1.0])[:, None, None] * np.ones((2, 4, HIDDEN))
    features = Features(jnp.asarray(1e3 * signs, jnp.float32), features.layers)

    @eqx.filter_jit
    def prefers_first(keys):
        state = draft.init(target, features, tokens, jnp.array([4, 4], jnp.int32), 16)
        # A lookup that was right half of the time.
        halves = dataclasses.replace(state[2], accepted=state[2].accepted + 5.0, offered=state[2].offered + 10.0)
        sampler = IndependentSampler(Sampling(1.0), keys)
        return draft.propose(target, (*state[:2], halves), last, sampler, HEADS)[1][2].prefers_first

    for seed in range(2):
        assert prefers_first(jr.split(jr.key(seed), 2)).tolist() == [False, True]


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
        MarkovHeads(8, 2, key=jr.key(0)).check(target)


@pytest.mark.parametrize("words", [None, list(range(3, 10))], ids=["all tokens", "few"])
def test_the_directions_are_unembedded_once_a_segment(target, words):
    """In the compiled program no loop contains the product: XLA has taken it out."""
    rows, rank = 4, 6
    vocabulary = None if words is None else ReducedVocabulary(words)
    heads = randomise(MarkovHeads(HIDDEN, HEADS, rank, key=jr.key(0)), 0, 0.3)
    heads = eqx.tree_at(lambda heads: heads.vocabulary, heads, vocabulary or heads.vocabulary)
    size = target.vocab_size if words is None else len(words)

    @jax.jit
    def segment(target, heads, state, last_token):
        def one_round(carry):
            last_token, count = carry
            sampler = IndependentSampler(Sampling(1.0), jr.split(jr.fold_in(jr.key(0), count), rows))
            proposal, _ = heads.propose(target, state, last_token, sampler, 2)
            return proposal.tokens[:, -1], count + 1

        return lax.while_loop(lambda carry: carry[1] < 5, one_round, (last_token, 0))

    jax.config.update("jax_disable_most_optimizations", False)  # as it is outside of these tests
    try:
        compiled = segment.lower(target, heads, jnp.ones((rows, HIDDEN)), jnp.zeros(rows, jnp.int32)).compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    product = re.compile(rf"= f32\[({rank},{size}|{size},{rank})\]\S* (dot|fusion|call|custom-call)\(")
    found = {computation.split()[0] for computation in compiled.as_text().split("\n\n") if product.search(computation)}
    assert {name for name in found if not name.startswith("%fused_computation")} == {"ENTRY"}
