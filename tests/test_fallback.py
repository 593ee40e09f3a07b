"""The first draft where it has a match and was right, the second elsewhere, decided before anything is drawn."""

import functools as ft
import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import (
    TabularDraft,
    quick_compilation,
    randomise,
    sequence_law,
    tabular_model,
    tiny_transformer,
)
from made_rollouts import make_rollouts
from scipy import stats

from eqx_specgrpo.decoding import Block, Coupled, FixedLength, Rejection, decode
from eqx_specgrpo.drafts import (
    DraftError,
    EagleDraft,
    FallbackDraft,
    HydraHeads,
    IndependentSampler,
    NGramDraft,
    NoDraft,
    Proposal,
    _fallback as fallback_module,
    draft_kind,
    load_draft,
    remember,
    save_draft,
)
from eqx_specgrpo.drafts._track_record import TrackRecord
from eqx_specgrpo.errors import CheckpointError
from eqx_specgrpo.grpo import apply_gradients
from eqx_specgrpo.models import Features
from eqx_specgrpo.sampling import Categorical, Sampling

HIDDEN, LENGTH = 16, 2


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


#
# One round, by enumeration
#


VOCAB = 3
_RNG = np.random.default_rng(1)
TARGET_TREE = [1.5 * _RNG.standard_normal([VOCAB] * (depth + 1)) for depth in range(LENGTH + 1)]
DRAFT_TREE = [1.5 * _RNG.standard_normal([VOCAB] * (depth + 1)) for depth in range(LENGTH)]
SUPPORT = [2, 0]  # a reduced vocabulary of the second draft


def _always(drafted: np.ndarray) -> np.ndarray:
    return np.ones(len(drafted), bool)


def _never(drafted: np.ndarray) -> np.ndarray:
    return np.zeros(len(drafted), bool)


def _where_unlikely(drafted: np.ndarray) -> np.ndarray:
    """Wrong on purpose: the match replaces what was drawn where that looks doubtful."""
    return drafted[:, 0] < 0.4


def _where_one_token_came(drafted: np.ndarray) -> np.ndarray:
    """Wrong on purpose: the match takes over after a certain first token (the chains are in the order of theirs)."""
    return np.arange(len(drafted)) ** 2 < len(drafted)


def _softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@ft.cache
def _law_of_a_verdict(verifier):
    def one(target_logits, proposal):
        target = Categorical.from_logits(target_logits)
        weights = jax.vmap(lambda num: verifier.next_weights(target, proposal, num))(jnp.arange(LENGTH + 1))
        return verifier.survival(target, proposal), weights

    return jax.jit(jax.vmap(one))


def _error(verifier, match: tuple[int, int], is_matched, support: list[int] | None) -> float:
    """How far the law of three tokens is from the target's: all that the second draft may draw, all verdicts, all next
    tokens; beyond what the round emits the target itself goes on."""
    ids = list(range(VOCAB)) if support is None else support
    chains = np.array(list(it.product(ids, repeat=LENGTH)), np.int32)
    logits = [DRAFT_TREE[0][ids] - np.zeros((len(chains), 1)), DRAFT_TREE[1][chains[:, 0]][:, ids]]
    logits = np.stack(logits, axis=1)
    probs = _softmax(logits)
    drafted = np.array([[probs[r, i, ids.index(token)] for i, token in enumerate(c)] for r, c in enumerate(chains)])
    distribution = Categorical.from_logits(jnp.asarray(logits, jnp.float32))
    if support is not None:
        repeated = jnp.broadcast_to(jnp.array(support, jnp.int32), logits.shape)
        distribution = Categorical(distribution.logits, distribution.log_normalizer, repeated)
    matches = jnp.broadcast_to(jnp.array(match, jnp.int32), chains.shape)
    proposal = fallback_module.prefer_matches(
        matches, jnp.asarray(is_matched(drafted)), Proposal(jnp.asarray(chains), distribution)
    )
    tokens = np.asarray(proposal.tokens)
    target_logits = [TARGET_TREE[0] + np.zeros((len(chains), 1)), TARGET_TREE[1][tokens[:, 0]]]
    target_logits = np.stack([*target_logits, TARGET_TREE[2][tokens[:, 0], tokens[:, 1]]], axis=1)
    survival, weights = _law_of_a_verdict(verifier)(jnp.asarray(target_logits, jnp.float32), proposal)
    survival, weights = np.asarray(survival, np.float64), np.asarray(weights, np.float64)

    law = np.zeros([VOCAB] * (LENGTH + 1))
    for row, chain in enumerate(tokens):
        at_least = [1.0, *survival[row], 0.0]
        for num in range(LENGTH + 1):
            emitted = weights[row, num] / weights[row, num].sum() * (at_least[num] - at_least[num + 1])
            for table in TARGET_TREE[num + 1 :]:
                emitted = emitted[..., None] * _softmax(table[tuple(chain[:num])])
            law[tuple(chain[:num])] += drafted[row].prod() * emitted
    first, second, third = (_softmax(table) for table in TARGET_TREE)
    return np.abs(law - first[:, None, None] * second[:, :, None] * third).max()


@pytest.mark.parametrize("support", [None, SUPPORT], ids=["vocabulary", "support"])
@pytest.mark.parametrize("verifier", [Rejection(), Block()], ids=["rejection", "block"])
def test_the_law_is_the_targets_unless_the_decision_looks_at_what_was_drawn(verifier, support):
    """Matches of every kind: outside the second draft's ids, first or last of them."""
    for match in it.product(range(VOCAB), repeat=LENGTH):
        for is_matched in (_always, _never):
            assert _error(verifier, match, is_matched, support) < 1e-6
    for is_matched in (_where_unlikely, _where_one_token_came):
        for match in ((0, 1), (2, 0)):
            assert _error(verifier, match, is_matched, support) > 0.01


def test_matched_rows_are_point_masses_and_the_others_are_untouched():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((4, 3, 5)), jnp.float32)
    ids = jnp.asarray(np.stack([[rng.permutation(9)[:5] for _ in range(3)] for _ in range(4)]), jnp.int32)
    prefer_matches = eqx.filter_jit(fallback_module.prefer_matches)
    matches, is_matched = jnp.asarray(rng.integers(0, 5, (4, 3)), jnp.int32), jnp.array([True, False, True, False])
    for support, vocab in ((None, 5), (ids, 9)):
        plain = Categorical.from_logits(logits)
        others = Proposal(jnp.zeros((4, 3), jnp.int32), Categorical(plain.logits, plain.log_normalizer, support))
        found = prefer_matches(matches, is_matched, others)
        np.testing.assert_array_equal(found.tokens, np.where(is_matched[:, None], matches, 0))
        probs = np.asarray(found.distribution.probs(vocab))
        np.testing.assert_array_equal(probs[0::2], np.asarray(jax.nn.one_hot(matches, vocab))[0::2])
        np.testing.assert_array_equal(probs[1::2], np.asarray(others.distribution.probs(vocab))[1::2])
        np.testing.assert_array_equal(found.token_logprobs()[0::2], 0.0)
        if support is not None:
            assert all(len(set(row)) == 5 for row in np.asarray(found.distribution.support).reshape(-1, 5).tolist())
    assert fallback_module.prefer_matches(matches, is_matched, Proposal(matches, None)).distribution is None


#
# The draft
#


TARGET = tiny_transformer(num_layers=2)
NGRAM = NGramDraft(LENGTH, siblings=4, memory_size=4, memory_length=8)
HYDRA = HydraHeads(HIDDEN, 3, key=jr.key(0))
EAGLE = randomise(
    eqx.filter_eval_shape(EagleDraft, HIDDEN, layers=(1, 0), max_length=4, train_length=1, num_heads=2, key=jr.key(0)),
    0,
    0.3,
)


def test_who_drafts_depends_on_what_is_committed_and_judged_alone():
    """The row that repeats itself is matched, the other is not, whatever the second draft draws there."""
    draft = FallbackDraft(NGRAM, HYDRA)
    tokens, last = jnp.array([[1, 2, 3, 1], [4, 5, 6, 7]], jnp.int32), jnp.array([2, 8], jnp.int32)
    features = Features(jr.normal(jr.key(1), (2, 4, HIDDEN)))
    state = eqx.filter_jit(draft.init)(TARGET, features, tokens, jnp.array([4, 4], jnp.int32), 12)

    @eqx.filter_jit
    def propose(draft, state, keys):
        return draft.propose(TARGET, state, last, IndependentSampler(Sampling(1.0), keys), LENGTH)[0]

    seen = set()
    for seed in range(8):
        keys = jr.split(jr.key(seed), 2)
        found, alone = propose(draft, state, keys), propose(HYDRA, state[1], keys)
        np.testing.assert_array_equal(found.tokens[0], [3, 1])
        np.testing.assert_array_equal(found.tokens[1], alone.tokens[1])
        np.testing.assert_array_equal(found.distribution.logits[1], alone.distribution.logits[1])
        np.testing.assert_array_equal(found.token_logprobs()[0], 0.0)
        seen.add(tuple(np.asarray(alone.tokens[0]).tolist()))
    assert len(seen) > 4


def _decode(draft, verifier, target=TARGET, prompts=((1, 2, 3), (4, 5), (6, 7, 8, 9)), **settings):
    settings = {"samples": 2, "max_new_tokens": 20, "smallest_bucket": 6, "sampling": Sampling(0.8)} | settings
    return decode(
        target, [list(prompt) for prompt in prompts], draft=draft, verifier=verifier, key=jr.key(3), **settings
    )


def test_tokens_are_those_of_plain_decoding_under_coupling():
    """With a second draft that reads layers, in an order of its own, has a cache, and could draft more."""
    draft = FallbackDraft(NGRAM, EAGLE)
    assert draft.max_length == LENGTH and draft.layers == (0, 1) and draft.train_length == 1
    plain, found = _decode(NoDraft(), Coupled()), _decode(draft, Coupled())
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)
    assert found.statistics.accepted.sum() > 5


def test_the_second_draft_is_given_its_own_layers_and_room():
    features = Features(jnp.ones((1, 3, HIDDEN)), tuple(jr.normal(jr.key(i), (1, 3, HIDDEN)) for i in range(2)))
    draft, eagle = FallbackDraft(NGRAM, EAGLE), EAGLE
    swapped = Features(features.last, features.layers[::-1])
    tokens, lengths = jnp.array([[1, 2, 3]], jnp.int32), jnp.array([3], jnp.int32)

    @eqx.filter_jit
    def both(draft, features, capacity):
        return draft.init(TARGET, features, tokens, lengths, capacity), draft.train_hidden(TARGET, features, tokens)

    (first, then, _), hidden = both(draft, features, 10)
    alone, expected = both(eagle, swapped, 12)
    assert eqx.tree_equal(then, alone) and first.context.shape == (1, 10)
    np.testing.assert_array_equal(hidden, expected)
    assert (np.asarray(both(eagle, features, 12)[1]) != np.asarray(expected)).any()


def test_the_law_of_rollouts_is_the_targets():
    """A batch in which some rows are matched, some of them by the record, and others are not."""
    rows, new, prompt = 1024, 6, [3, 1, 2, 3]
    target, sampling = tabular_model(seed=0, vocab=4, scale=1.0), Sampling(1.0)
    table = target.table[0] + np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    lookup = NGramDraft(LENGTH, min_ngram=1, max_ngram=2, siblings=2, memory_size=0)
    draft = FallbackDraft(lookup, TabularDraft(table, LENGTH))
    settings = dict(samples=rows, max_new_tokens=new, smallest_bucket=rows, sampling=sampling)
    rollouts = _decode(draft, Rejection(), target, [prompt], length=FixedLength(LENGTH), **settings)
    law = sequence_law(target, sampling, prompt, new)
    for tokens, expected in (
        (rollouts.tokens[:, :3], law.sum((3, 4, 5))),
        (rollouts.tokens[:, 3:], law.sum((0, 1, 2))),
    ):
        counts = np.zeros(expected.shape)
        np.add.at(counts, tuple(tokens.T), 1)
        assert stats.chisquare(counts.ravel(), rows * expected.ravel()).pvalue > 1e-3


#
# Who was right
#


def _take(record: TrackRecord, rows: np.ndarray) -> TrackRecord:
    return jax.tree.map(lambda x: x[rows], record)


class _Counts:
    """The record of one row in plain Python."""

    def __init__(self):
        self.counts = {(match, draft): (0.0, 0.0) for match in (1, 2) for draft in (0, 1)}

    def share(self, match: int, draft: int) -> float:
        accepted, offered = self.counts[match, draft]
        return (accepted + 1) / (offered + 1)

    def first_guesses(self, match: int) -> bool:
        return match > 0 and self.share(match, 0) >= self.share(match, 1)

    def judge(self, match: int, accepted: int, length: int) -> None:
        if match == 0 or length == 0:
            return
        chosen = 0 if self.first_guesses(match) else 1
        for draft in (0, 1):
            old_accepted, old_offered = (31 / 32 * count for count in self.counts[match, draft])
            new = (accepted, length) if draft == chosen else (0, 0)
            self.counts[match, draft] = (old_accepted + new[0], old_offered + new[1])


def test_a_record_of_each_row_and_class_of_match():
    """Against a record in plain Python; rows are taken out half way."""
    rng, rows = np.random.default_rng(2), 5
    record, by_hand = TrackRecord.empty(rows, 2), [_Counts() for _ in range(rows)]
    accuracy, seen = rng.random((rows, 3)), []
    for turn in range(60):
        if turn == 30:
            kept = np.array([4, 0, 1])
            record, by_hand = eqx.filter_jit(_take)(record, kept), [by_hand[row] for row in kept]
            accuracy = accuracy[kept]
        match = rng.integers(0, 3, len(by_hand))
        record = record.choose(jnp.asarray(match, jnp.int32))
        assert [row.first_guesses(m) for row, m in zip(by_hand, match, strict=True)] == record.prefers_first.tolist()
        seen += record.prefers_first[match > 0].tolist()
        length = int(rng.integers(0, 4))
        accepted = rng.binomial(length, accuracy[np.arange(len(match)), match])
        record = record.judge(jnp.asarray(accepted, jnp.int32), length)
        for row, m, num in zip(by_hand, match, accepted, strict=True):
            row.judge(m, num, length)
    assert 0.2 < np.mean(seen) < 0.8


LOOKUP = NGramDraft(LENGTH, min_ngram=1, max_ngram=2, siblings=1, memory_size=0)
CYCLE, UNIFORM = 8.0 * np.roll(np.eye(4), 1, axis=1), np.zeros((4, 4))


def _after_two_tokens(of_target: np.ndarray, of_draft: np.ndarray, **settings):
    """Rows decoded with a lookup in front of a draft, by tables of logits over the token before."""
    model = tabular_model(seed=0, vocab=4, scale=1.0)
    table = jnp.broadcast_to(jnp.asarray(of_target, jnp.float32), model.table.shape)
    draft = FallbackDraft(LOOKUP, TabularDraft(jnp.asarray(of_draft, jnp.float32), LENGTH))
    settings = dict(samples=4, smallest_bucket=4, sampling=Sampling(1.0), length=FixedLength(LENGTH)) | settings
    model = eqx.tree_at(lambda m: m.table, model, table)
    return _decode(draft, Rejection(), model, [[3, 1]], max_new_tokens=40, **settings)


def test_the_draft_that_was_right_guesses():
    """Looking up is right where the target repeats itself, and wrong where it does not."""

    def share(of_target, of_draft) -> float:
        counts = _after_two_tokens(of_target, of_draft).statistics
        return counts.accepted.sum() / counts.drafted.sum()

    one_word = 9.0 * np.eye(4)[[0, 0, 0, 0]]
    assert share(CYCLE, CYCLE) > 0.95
    assert share(CYCLE, CYCLE.T) > 0.7  # four rounds in which nothing is known
    assert share(UNIFORM, UNIFORM) > 0.75 > 0.4 > share(UNIFORM, one_word)


def test_who_drafts_does_not_depend_on_the_batch():
    """The same tokens whether all rows go together or two at a time, with one row let in where another has ended."""
    together = _after_two_tokens(UNIFORM, CYCLE / 8, eos_ids=[2])
    in_turn = _after_two_tokens(UNIFORM, CYCLE / 8, eos_ids=[2], max_rows=2, smallest_bucket=2)
    np.testing.assert_array_equal(together.tokens, in_turn.tokens)
    np.testing.assert_array_equal(together.statistics.accepted, in_turn.statistics.accepted)
    assert len(set(together.lengths.tolist())) > 2


#
# As a module
#


def _with_memory(draft):
    return remember(draft, make_rollouts([[1, 2]], [0, 0], [[3, 4, 5], [6]]))


def test_only_the_second_learns_and_only_the_first_remembers():
    draft = _with_memory(FallbackDraft(NGRAM, HYDRA))
    np.testing.assert_array_equal(draft.first.memory.lengths, [3, 1, 0, 0])
    assert eqx.tree_equal(draft.then, HYDRA)
    before = jax.tree.map(np.asarray, draft)
    optimizer = optax.sgd(1.0)
    params = eqx.filter(draft, eqx.is_inexact_array)
    gradients = jax.tree.map(jnp.ones_like, params)
    after, _ = apply_gradients((optimizer, gradients, jnp.float32(0.1)), draft, optimizer.init(params))
    assert eqx.tree_equal(jax.tree.map(np.asarray, after.first), before.first, typematch=True)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).min(), jax.tree.map(np.asarray, after.then), before.then)
    assert min(jax.tree.leaves(moved)) > 0.05
    # A second draft with a history is told as well.
    both = _with_memory(FallbackDraft(NGRAM, NGramDraft(3, memory_size=2)))
    np.testing.assert_array_equal(both.then.memory.lengths, [3, 1])


def test_saving_and_loading_is_exact(tmp_path):
    drafts = {"hydra": FallbackDraft(NGRAM, HYDRA), "nested": FallbackDraft(NGRAM, FallbackDraft(NGRAM, NGRAM))}
    for name, draft in drafts.items():
        draft = _with_memory(draft)
        save_draft(tmp_path / name, draft, TARGET, "tiny")
        loaded = load_draft(tmp_path / name, TARGET)
        assert eqx.tree_equal(loaded, draft, typematch=True) and draft_kind(loaded) == "fallback"
    path = tmp_path / "nested" / "draft.json"
    path.write_text(path.read_text().replace('"kind": "ngram"', '"kind": "medusa"', 1))
    with pytest.raises(CheckpointError, match="draft.json"):
        load_draft(tmp_path / "nested", TARGET)


def test_both_are_checked():
    FallbackDraft(NGRAM, HYDRA).check(TARGET)
    with pytest.raises(DraftError, match="size 8"):
        FallbackDraft(NGRAM, HydraHeads(8, 2, key=jr.key(0))).check(TARGET)
    with pytest.raises(DraftError, match="remembers token"):
        FallbackDraft(_with_memory(NGRAM), NoDraft()).check(tabular_model(seed=0, vocab=3, scale=1.0))
