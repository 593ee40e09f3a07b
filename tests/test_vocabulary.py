"""Drafting from a part of the vocabulary: lossless, kept up to date, and cheap where it should be."""

import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, randomise, tiny_transformer
from jax import lax
from made_rollouts import make_rollouts

from eqx_specgrpo.decoding import Block, Coupled, FixedLength, Rejection, Sampling, decode
from eqx_specgrpo.distill import DraftBatch, ForwardKL, LKHybrid, TotalVariation, draft_gradients
from eqx_specgrpo.drafts import (
    DraftError,
    EagleDraft,
    FallbackDraft,
    FullVocabulary,
    HydraHeads,
    IndependentSampler,
    LayerSkipDraft,
    MarkovHeads,
    MedusaHeads,
    ModelDraft,
    NGramDraft,
    ReducedVocabulary,
    completion_tokens,
    coverage,
    draft_vocabulary,
    load_draft,
    most_used_tokens,
    remember,
    save_draft,
    with_vocabulary,
)
from eqx_specgrpo.models import cast_weights, sequence_features
from eqx_specgrpo.testing import check_draft
from eqx_specgrpo.testing._enumerate import enumerate_rounds
from eqx_specgrpo.testing._situations import only, random_tree

HIDDEN, VOCAB, LENGTH = 16, 13, 3
SOME = [11, 0, 12, 7, 4]
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


TARGET = tiny_transformer()
KINDS = {
    "medusa": lambda words: MedusaHeads.fresh(HIDDEN, LENGTH, words),
    "hydra": lambda words: HydraHeads(HIDDEN, LENGTH, vocabulary=words, key=jr.key(0)),
    "markov": lambda words: MarkovHeads(HIDDEN, LENGTH, 5, words, key=jr.key(0)),
    "eagle": lambda words: EagleDraft(HIDDEN, layers=(0,), max_length=LENGTH, vocabulary=words, key=jr.key(0)),
    "layer skip": lambda words: LayerSkipDraft(HIDDEN, 1, LENGTH, vocabulary=words, key=jr.key(0)),
    "model": lambda words: ModelDraft(tiny_transformer(seed=1, num_layers=1), LENGTH, words),
}


def draft_of(kind: str, ids: list[int] | None = None):
    """A draft with random weights."""
    vocabulary = None if ids is None else ReducedVocabulary(ids)
    draft = KINDS[kind](vocabulary)
    weights, rest = eqx.partition(draft, eqx.is_inexact_array)
    return eqx.combine(randomise(weights, 1, 0.3), rest)


@eqx.filter_jit
def propose(draft, target, tokens, last_token, key):
    features = sequence_features(target, tokens, layers=draft.layers)
    lengths = jnp.full(tokens.shape[0], tokens.shape[1])
    state = draft.init(target, features, tokens, lengths, 16)
    sampler = IndependentSampler(Sampling(1.0), jr.split(key, tokens.shape[0]))
    return draft.propose(target, state, last_token, sampler, LENGTH)[0]


def propose_many(draft, rows: int = 40):
    rng = np.random.default_rng(0)
    tokens, last = rng.integers(0, VOCAB, (rows, 5), np.int32), rng.integers(0, VOCAB, rows, np.int32)
    return propose(draft, TARGET, jnp.asarray(tokens), jnp.asarray(last), jr.key(1))


#
# Lossless
#


@pytest.mark.parametrize("rule", [Rejection(), Block()], ids=["rejection", "block"])
@pytest.mark.parametrize("length", [1, 2])
def test_the_output_law_is_the_targets(rule, length):
    """Enumerated, with targets inside and outside of what the draft can say."""
    rng, support = np.random.default_rng(length), np.array([3, 0, 2], np.int32)
    target = [np.concatenate(x) for x in zip(*(random_tree(rng, 4, length + 1, s) for s in (0.5, 4.0)), strict=True)]
    inside, outside = only(target, [0, 2]), only(target, [1])
    target = [np.concatenate(x) for x in zip(target, inside, outside, strict=True)]
    draft = only([np.concatenate([logits] * 3) for logits in random_pair(rng, length)], support.tolist())
    names = tuple(f"{where} {scale}" for where in ("all", "inside", "outside") for scale in ("diffuse", "sharp"))
    outcome = enumerate_rounds(rule, target, draft, length, names, support)
    assert outcome.errors.max() < 1e-6
    assert (outcome.accepted[:4] > 0.1).all() and outcome.accepted[4:].max() == 0


def random_pair(rng, length):
    return [np.concatenate(x) for x in zip(*(random_tree(rng, 4, length, s) for s in (0.5, 2.0)), strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_plain_decoding(kind):
    def tokens(draft):
        return decode(
            TARGET, PROMPTS, draft=draft, verifier=Coupled(), length=FixedLength(LENGTH), sampling=Sampling(1.0),
            key=jr.key(9), max_new_tokens=20, eos_ids=[12], samples=4, smallest_bucket=12,
        )  # fmt: skip

    found, plain = tokens(draft_of(kind, SOME)), tokens(None)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert found.statistics.accepted.sum() > 0
    assert not np.isin(plain.tokens, SOME).all()


def test_the_whole_certificate():
    check_draft(draft_of("eagle", SOME), TARGET)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_vocabulary_is_proposed_with_the_full_drafts_odds(kind):
    few, whole = propose_many(draft_of(kind, SOME)), propose_many(draft_of(kind))
    assert set(np.unique(few.tokens)) == set(SOME)
    np.testing.assert_array_equal(few.distribution.support, np.broadcast_to(SOME, (40, LENGTH, 5)))
    # The first position has seen no drafted token: there it is the full draft, renormalised.
    expected = np.asarray(whole.distribution.probs())[:, 0, SOME]
    expected = expected / expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(few.distribution.probs(VOCAB)[:, 0, np.array(SOME)], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_all_tokens_in_another_order_are_the_full_vocabulary(kind):
    order = np.random.default_rng(3).permutation(VOCAB)
    permuted, whole = propose_many(draft_of(kind, order.tolist())), propose_many(draft_of(kind))
    np.testing.assert_allclose(
        permuted.distribution.probs(VOCAB)[:, 0], np.asarray(whole.distribution.probs())[:, 0], atol=1e-5
    )

    def accepted(draft):
        return decode(
            TARGET, PROMPTS, draft=draft, verifier=Coupled(), length=FixedLength(LENGTH), key=jr.key(2),
            max_new_tokens=20, samples=4, smallest_bucket=12,
        ).statistics.accepted  # fmt: skip

    # With shared noise, which belongs to token ids, even the guesses are the same.
    np.testing.assert_array_equal(accepted(draft_of(kind, order.tolist())), accepted(draft_of(kind)))


#
# Learning
#


def learn(draft, loss, temperature=0.8):
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (3, 14), np.int32))
    batch = DraftBatch(
        sequence_features(TARGET, tokens, layers=draft.layers), tokens, jnp.array([3, 4, 5]), jnp.array([11, 8, 6])
    )
    result = draft_gradients(
        draft, TARGET, batch, loss, temperature=jnp.float32(temperature), alpha=jnp.full(LENGTH, 0.2),
        position_decay=jnp.float32(0.8), new=11, chunk=8,
    )  # fmt: skip
    return batch, result


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))])


@pytest.mark.parametrize("loss", [ForwardKL(), TotalVariation(), LKHybrid(eta=3.0)], ids=lambda x: type(x).__name__)
def test_learning_over_all_tokens_in_another_order_is_learning_over_the_vocabulary(loss):
    order = np.random.default_rng(3).permutation(VOCAB).tolist()
    (_, permuted), (_, whole) = learn(draft_of("medusa", order), loss), learn(draft_of("medusa"), loss)
    np.testing.assert_allclose(permuted.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(permuted.acceptance, whole.acceptance, rtol=1e-5)
    np.testing.assert_allclose(flat(permuted.gradients), flat(whole.gradients), atol=1e-6)


@pytest.mark.parametrize("loss", [ForwardKL(), TotalVariation()], ids=lambda x: type(x).__name__)
def test_learning_over_some_tokens(loss):
    """By hand: the KL of the target renormalised on them, the variation of the target as it is."""
    draft, temperature = draft_of("medusa", SOME), 0.8
    batch, result = learn(draft, loss, temperature)
    hidden = draft.train_hidden(TARGET, batch.features, batch.tokens)
    q = np.asarray(jax.nn.softmax(TARGET.unembed(hidden)[..., np.array(SOME)] / temperature), np.float64)
    p = np.asarray(jax.nn.softmax(TARGET.unembed(batch.features.last) / temperature), np.float64)
    losses, acceptances = [], []
    for offset in range(LENGTH):
        at = [
            (row, prompt - 1 + place)
            for row, (prompt, new) in enumerate(zip((3, 4, 5), (11, 8, 6), strict=True))
            for place in range(11)
            if place + 1 + offset < new
        ]
        rows, places = np.array(at).T
        target, guess = p[rows, places + 1 + offset], q[rows, places, offset]
        overlap = np.minimum(target[:, SOME], guess).sum(-1)
        acceptances.append(overlap.mean())
        if isinstance(loss, ForwardKL):
            inside = target[:, SOME] / target[:, SOME].sum(-1, keepdims=True)
            losses.append((inside * np.log(inside / guess)).sum(-1).mean())
        else:
            losses.append(1 - overlap.mean())
    decay = 0.8 ** np.arange(LENGTH)
    np.testing.assert_allclose(result.loss, decay @ losses / decay.sum(), rtol=1e-4)
    np.testing.assert_allclose(result.acceptance, acceptances, rtol=1e-4)
    gradient = flat(result.gradients)
    assert np.isfinite(gradient).all() and gradient.any()


#
# Which tokens
#


def test_the_most_used_tokens():
    tokens = np.array([5, 5, 5, 2, 2, 9, 7, 7])
    np.testing.assert_array_equal(most_used_tokens(tokens, 3, VOCAB), [5, 2, 7])
    np.testing.assert_array_equal(most_used_tokens(tokens, 7, VOCAB, always=(12, 2)), [12, 2, 5, 7, 9, 0, 1])
    np.testing.assert_array_equal(most_used_tokens(np.zeros(0, int), 3, VOCAB, always=(12,)), [12, 0, 1])
    assert sorted(most_used_tokens(tokens, VOCAB, VOCAB)) == list(range(VOCAB))


def test_coverage():
    rollouts = make_rollouts([[1]], [0, 0], [[5, 5, 2], [9]])
    np.testing.assert_array_equal(completion_tokens(rollouts), [5, 5, 2, 9])
    tokens = completion_tokens(rollouts)
    assert coverage(ReducedVocabulary([5, 2]), tokens) == 0.75
    assert coverage(ReducedVocabulary([1]), tokens) == 0
    assert coverage(FullVocabulary(), tokens) == 1
    assert coverage(ReducedVocabulary([1]), tokens[:0]) == 1


def test_remembering_puts_new_tokens_first_and_drops_what_went_unused_longest():
    draft = draft_of("medusa", SOME)
    draft = remember(draft, make_rollouts([[1]], [0, 0], [[5, 5, 0], [9, 0, 0]]))
    assert draft.vocabulary.ids.tolist() == [0, 5, 9, 11, 12]
    draft = remember(draft, make_rollouts([[1]], [0], [[7]]))
    assert draft.vocabulary.ids.tolist() == [7, 0, 5, 9, 11]
    # More than there is room for: those used most.
    draft = remember(draft, make_rollouts([[1]], [0], [[1, 1, 2, 2, 3, 3, 4, 4, 6, 6, 8]]))
    assert draft.vocabulary.ids.tolist() == [1, 2, 3, 4, 6]
    assert draft.vocabulary.ids.dtype == jnp.int32
    whole = draft_of("medusa")
    assert eqx.tree_equal(remember(whole, make_rollouts([[1]], [0], [[7]])), whole)


def test_another_vocabulary_of_the_same_size_is_the_same_program():
    traced = []

    @eqx.filter_jit
    def program(draft):
        traced.append(1)
        return draft.vocabulary.unembed(TARGET, jnp.ones((2, HIDDEN)))

    draft = draft_of("medusa", SOME)
    first = program(draft)
    second = program(remember(draft, make_rollouts([[1]], [0], [[5, 9]])))
    program(with_vocabulary(draft, ReducedVocabulary(np.arange(5))))
    assert len(traced) == 1
    np.testing.assert_allclose(second[:, 2:], first[:, :3], rtol=1e-6)


def test_a_vocabulary_is_found_and_exchanged_wherever_it_is():
    new = ReducedVocabulary([3, 1])
    for draft in (draft_of("hydra"), FallbackDraft(NGramDraft(LENGTH), draft_of("eagle", SOME))):
        changed = with_vocabulary(draft, new)
        assert draft_vocabulary(changed).support.tolist() == [3, 1]
        assert draft_vocabulary(with_vocabulary(changed, FullVocabulary())).support is None
    assert draft_vocabulary(NGramDraft(LENGTH)).support is None
    with pytest.raises(DraftError, match="NGramDraft has no vocabulary of its own"):
        with_vocabulary(NGramDraft(LENGTH), new)


def test_it_is_neither_trained_nor_cast():
    draft = draft_of("medusa", SOME)
    trained = jax.tree.leaves(eqx.filter(draft, eqx.is_inexact_array))
    assert len(trained) == 2
    half = cast_weights(draft, jnp.bfloat16)
    assert half.vocabulary.ids.dtype == jnp.int32 and half.weight.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path):
    draft = draft_of(kind, SOME)
    save_draft(tmp_path, draft, TARGET, "tiny")
    assert '"vocabulary": 5' in (tmp_path / "draft.json").read_text()
    assert eqx.tree_equal(load_draft(tmp_path, TARGET), draft)


def test_saved_and_loaded_behind_a_lookup(tmp_path):
    draft = FallbackDraft(NGramDraft(LENGTH), draft_of("hydra", SOME))
    save_draft(tmp_path, draft, TARGET, "tiny")
    assert draft_vocabulary(load_draft(tmp_path, TARGET)).support.tolist() == SOME


def test_a_saved_vocabulary_larger_than_the_targets(tmp_path):
    save_draft(tmp_path, draft_of("hydra", SOME), TARGET, "tiny")
    about = json.loads((tmp_path / "draft.json").read_text())
    (tmp_path / "draft.json").write_text(json.dumps(about | {"vocabulary": 50}))
    with pytest.raises(DraftError, match="has a vocabulary of 50 tokens, but this target's is 13"):
        load_draft(tmp_path, TARGET)


def test_impossible_vocabularies():
    with pytest.raises(ValueError, match="has 7 in it 2 times"):
        ReducedVocabulary([1, 7, 3, 7])
    with pytest.raises(ValueError, match="has -1 in it"):
        ReducedVocabulary([1, -1])
    with pytest.raises(ValueError, match="at least one token id"):
        ReducedVocabulary([])
    with pytest.raises(ValueError, match="at least one token id"):
        ReducedVocabulary(np.array([1.0, 2.0]))
    for kind in KINDS:
        with pytest.raises(DraftError, match="has token 13, but the target's has only 13 tokens"):
            draft_of(kind, [1, 13]).check(TARGET)
    with pytest.raises(ValueError, match="of 14 tokens was asked for, but the target's has 13"):
        most_used_tokens(np.array([1]), 14, VOCAB)
    with pytest.raises(ValueError, match="of 0 tokens was asked for"):
        most_used_tokens(np.array([1]), 0, VOCAB)
    with pytest.raises(ValueError, match="2 are to be in it always"):
        most_used_tokens(np.array([1]), 1, VOCAB, always=(1, 2))
    with pytest.raises(ValueError, match="tokens has ids from 1 to 40"):
        most_used_tokens(np.array([1, 40]), 3, VOCAB)


#
# Cost
#


@pytest.mark.parametrize(("kind", "dtype"), [("medusa", jnp.float32), ("layer skip", jnp.bfloat16)])
def test_the_rows_of_the_unembedding_are_looked_up_once_a_segment(kind, dtype):
    """In the compiled program no loop contains the look-up: XLA has taken it out."""
    size, length = 7, 2
    target, draft = cast_weights((TARGET, draft_of(kind, list(range(3, 3 + size)))), dtype)
    rows, sampling, verifier = 4, Sampling(1.0), Rejection()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (rows, 5), np.int32))
    state = draft.init(
        target, sequence_features(target, tokens, layers=draft.layers), tokens, jnp.full(rows, 5, jnp.int32), 40
    )

    @jax.jit
    def segment(target, draft, state, last_token):
        """Rounds of drafting, in which all is accepted."""

        def one_round(carry):
            state, last_token, count = carry
            sampler = verifier.sampler(sampling, jr.split(jr.key(0), rows), jnp.full(rows, 7) + count)
            proposal, state = draft.propose(target, state, last_token, sampler, length)
            block = jnp.concatenate([last_token[:, None], proposal.tokens], axis=1)
            positions = jnp.broadcast_to(5 + count + jnp.arange(length + 1), block.shape)
            features, _ = target.hidden(block, positions, target.no_cache(), layers=draft.layers)
            state = draft.commit(target, state, features, block, jnp.full(rows, length))
            return state, block[:, -1], count + 1

        return lax.while_loop(lambda carry: carry[2] < 5, one_round, (state, last_token, 0))

    jax.config.update("jax_disable_most_optimizations", False)  # as it is outside of these tests
    try:
        text = segment.lower(target, draft, state, jnp.zeros(rows, jnp.int32)).compile().as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    lookup = re.compile(rf"= \w+\[{size},(1,)?{HIDDEN}\]\S* (gather|fusion|call)\(")
    found = {computation.split()[0] for computation in text.split("\n\n") if lookup.search(computation)}
    # What a fusion consists of is not where it is run.
    assert {name for name in found if not name.startswith("%fused_computation")} == {"ENTRY"}
