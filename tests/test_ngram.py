"""Lookups against a slow reference that keeps everything in lists, and decoding with them."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, sequence_law, tabular_model, tiny_transformer
from made_rollouts import make_rollouts
from scipy import stats

from eqx_specgrpo._types import Prompts, Rollouts
from eqx_specgrpo.decoding import Coupled, FixedLength, Rejection, decode, teacher_forced_logprobs
from eqx_specgrpo.drafts import (
    DraftError,
    HydraHeads,
    NGramDraft,
    NoDraft,
    _ngram_memory as ngram_memory,
    draft_kind,
    load_draft,
    remember,
    save_draft,
)
from eqx_specgrpo.models import Features
from eqx_specgrpo.sampling import GreedySampling, Sampling

LENGTH, MAX_NGRAM, MIN_NGRAM = 3, 4, 2


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


#
# The reference
#


def _candidate(stream: list[int], context: list[int]) -> tuple[int, int] | None:
    for n in range(min(MAX_NGRAM, len(context)), MIN_NGRAM - 1, -1):
        for end in range(len(stream) - 1, n - 1, -1):
            if stream[end - n : end] == context[-n:]:
                return n, end
    return None


def _look_up(context: list[int], streams: list[list[int]]) -> tuple[list[int], int]:
    """The draft after `context`, of which nothing is looked up beyond its end, and the class of the longest match."""
    says = []
    for stream in [context, *streams]:
        found = _candidate(stream, context)
        if found is None:
            continue
        n, end = found
        rest = stream[end:]
        if stream is context:
            rest = [*rest, *rest, *rest, *rest][:LENGTH]
        says.append((n, rest[:LENGTH]))
    drafted = []
    match = max((n - MIN_NGRAM + 1 for n, _ in says), default=0)
    for position in range(LENGTH):
        says = [(n, rest) for n, rest in says if rest[:position] == drafted and len(rest) > position]
        longest = max((n for n, _ in says), default=0)
        votes = [rest[position] for n, rest in says if n == longest]
        drafted.append(max(votes, key=votes.count) if votes else [*context, *drafted][-1])
    return drafted, match


class Row:
    """What a row has said, and whom it has heard."""

    def __init__(self, prompt: list[int], first: int):
        self.prompt, self.fed, self.last_token = prompt, [], first
        self.siblings: dict[int, Row] = {}
        self.memory: list[list[int]] = []

    def draft(self) -> tuple[list[int], int]:
        tail = self.prompt[-MAX_NGRAM:]
        heard = [tail + row.fed for _, row in sorted(self.siblings.items()) if row is not self]
        return _look_up([*self.prompt, *self.fed, self.last_token], heard + [tail + text for text in self.memory])


@eqx.filter_jit
def _init(draft, features, tokens, lengths, capacity):
    return draft.init(None, features, tokens, lengths, capacity)


@eqx.filter_jit
def _propose(draft, state, last_token):
    return draft.propose_matches(None, state, last_token, LENGTH)


@eqx.filter_jit
def _commit(draft, state, block, num_accepted):
    return draft.commit(None, state, None, block, num_accepted)


@eqx.filter_jit
def _take(state, rows):
    return jax.tree.map(lambda x: x[rows], state)


PROMPTS = [[0, 1, 2, 0, 1], [2, 1], [0, 1, 2, 0, 1]]


@pytest.mark.parametrize("vocab", [2, 3])
def test_lookups_are_those_of_the_reference(vocab):
    """Random texts over few tokens; siblings in two groups (two prompts are equal), more of them than are listened to;
    rows that finish, then leave; rounds with and without drafting; remembered rollouts, some of them forgotten."""
    rng, samples, listened, room = np.random.default_rng(vocab), 2, 3, 40
    draft = NGramDraft(
        LENGTH,
        max_ngram=MAX_NGRAM,
        min_ngram=MIN_NGRAM,
        siblings=listened,
        memory_size=4,
        memory_length=9,
        recalled=2,
    )
    prompts = [[token % vocab for token in prompt] for prompt in PROMPTS]
    told = [(prompts[int(i)], rng.integers(0, vocab, rng.integers(2, 14)).tolist()) for i in [0, 1, 1, 2, 1, 0]]
    for part in (told[:3], told[3:]):
        draft = remember(
            draft, make_rollouts(*map(list, zip(*[(p, i, c) for i, (p, c) in enumerate(part)], strict=True)))
        )

    padded = Prompts.from_lists(prompts)
    features = Features(jnp.zeros((len(prompts), 1, 1)))
    state = _init(
        draft, features, jnp.asarray(padded.tokens), jnp.asarray(padded.lengths), padded.tokens.shape[1] + room
    )
    prompt_of_row = np.repeat(np.arange(len(prompts)), samples)
    state = _take(state, prompt_of_row)
    rows = [Row(prompts[prompt], int(rng.integers(vocab))) for prompt in prompt_of_row]
    for row in rows:
        kept = [completion[:9] for prompt, completion in reversed(told[2:]) if prompt == row.prompt]
        row.memory = kept[:2]
        group = [other for other in rows if other.prompt == row.prompt]
        row.siblings = dict(enumerate(group[:listened]))
    heard = {id(row): row.siblings for row in rows}
    for row in rows:
        row.siblings = {}  # nothing has been said

    matched, finished = [], {}
    for turn in range(14):
        last = jnp.array([row.last_token for row in rows], jnp.int32)
        if turn == 9:
            keep = np.array([3, 5, 0, 2])
            state, rows, last = _take(state, keep), [rows[i] for i in keep], last[keep]
        expected = [row.draft() for row in rows]
        block = last[:, None]
        if turn not in (2, 6):
            proposal, match, state = _propose(draft, state, last)
            assert proposal.distribution is None
            np.testing.assert_array_equal(proposal.tokens, [drafted for drafted, _ in expected])
            np.testing.assert_array_equal(match, [found for _, found in expected])
            matched += (np.asarray(match) > 0).tolist()
            block = jnp.concatenate([block, proposal.tokens], axis=1)
        num_accepted = rng.integers(0, block.shape[1], len(rows))
        if turn == 7:
            finished = {id(rows[1]), id(rows[4])}
        num_accepted = np.array([-1 if id(row) in finished else n for row, n in zip(rows, num_accepted, strict=True)])
        state = _commit(draft, state, block, jnp.asarray(num_accepted, jnp.int32))
        for row, said, num in zip(rows, np.asarray(block).tolist(), num_accepted, strict=True):
            row.fed += said[: num + 1]
            row.siblings = heard[id(row)]
            if num >= 0:
                row.last_token = int(rng.integers(vocab))
    assert True in matched
    if vocab == 3:
        assert False in matched


def test_the_newest_rollouts_of_a_prompt_are_recalled_and_no_others():
    memory = ngram_memory.RolloutMemory.empty(5, 4)
    memory = memory.add(make_rollouts([[7], [8, 9]], [0, 0, 1], [[1, 1], [2, 2, 2, 2, 2], [3]]))
    memory = memory.add(make_rollouts([[8, 9]], [0, 0, 0], [[4, 5], [6], [7, 8]]))
    ids = ngram_memory.prompt_ids(jnp.array([[8, 9, 0], [7, 0, 0], [9, 8, 0]]), jnp.array([2, 1, 2]))
    recall = eqx.filter_jit(lambda memory, ids, count, room: memory.recall(ids, count, room))
    tokens, lengths = recall(memory, ids, 3, 6)
    np.testing.assert_array_equal(lengths, [[2, 1, 2], [4, 0, 0], [0, 0, 0]])
    texts = [
        [np.asarray(text)[:n].tolist() for text, n in zip(*row, strict=True)]
        for row in zip(tokens, lengths, strict=True)
    ]
    assert texts == [[[7, 8], [6], [4, 5]], [[2, 2, 2, 2], [], []], [[], [], []]]
    np.testing.assert_array_equal(recall(memory, ids, 3, 1)[1], [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    # More rollouts than there is room for: the last of them.
    memory = memory.add(make_rollouts([[7]], [0] * 8, [[i] for i in range(8)]))
    tokens, lengths = recall(memory, ids[1:2], 9, 4)
    assert lengths.shape == (1, 5) and np.asarray(tokens[0, :, 0]).tolist() == [7, 6, 5, 4, 3]


def test_prompts_are_told_apart_whatever_their_padding():
    rng = np.random.default_rng(0)
    prompts = {tuple(rng.integers(0, 3, rng.integers(1, 9)).tolist()) for _ in range(300)}
    narrow, wide = Prompts.from_lists(list(prompts), 1), Prompts.from_lists(list(prompts), 32)
    tokens = np.where(np.arange(wide.tokens.shape[1])[None] < wide.lengths[:, None], wide.tokens, 99)
    ids = ngram_memory.prompt_ids(jnp.asarray(narrow.tokens), jnp.asarray(narrow.lengths))
    np.testing.assert_array_equal(ngram_memory.prompt_ids(jnp.asarray(tokens), jnp.asarray(wide.lengths)), ids)
    for words in (np.asarray(ids)[:, 0], np.asarray(ids)[:, 1]):
        assert len(np.unique(words)) == len(prompts)


#
# Decoding
#

TARGET = tiny_transformer(num_layers=1)
DECODE_PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def _decode(draft, verifier=None, sampling=None, target=TARGET, prompts=DECODE_PROMPTS, **settings):
    settings = {"key": jr.key(9), "max_new_tokens": 24, "eos_ids": [12], "samples": 2} | settings
    return decode(target, prompts, draft=draft, verifier=verifier, sampling=sampling, **settings)


def _check_same(found: Rollouts, plain: Rollouts):
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(found.stop_reasons, plain.stop_reasons)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)


def test_greedy_rollouts_repeat_themselves_and_then_are_remembered():
    target, draft = tabular_model(seed=0, vocab=4, scale=3.0), NGramDraft(LENGTH, siblings=0, memory_size=8)
    settings = dict(sampling=GreedySampling(), target=target, prompts=[[3, 1], [2]], eos_ids=[], samples=1)
    plain, first = _decode(NoDraft(), **settings), _decode(draft, **settings)
    _check_same(first, plain)
    assert first.statistics.acceptance_length > 1.5
    # Every drafted token is right from the first on; the prompts' pass gave one, and the last round may end early.
    second = _decode(remember(draft, first), **settings)
    _check_same(second, plain)
    np.testing.assert_array_equal(second.statistics.target_forwards, np.ceil((plain.lengths - 1) / (LENGTH + 1)))
    assert second.statistics.acceptance_length > first.statistics.acceptance_length


def test_tokens_are_those_of_plain_decoding_under_coupling():
    """While rows finish and leave: sharp enough for some matches to be accepted."""
    sampling = Sampling(0.7)
    plain = _decode(NoDraft(), Coupled(), sampling, smallest_bucket=8)
    found = _decode(NGramDraft(LENGTH, min_ngram=1), Coupled(), sampling)
    _check_same(found, plain)
    assert found.statistics.accepted.sum() > 10
    assert len(set(plain.lengths.tolist())) > 2


def test_the_law_of_rollouts_is_the_targets():
    """Although each row's draft is what its siblings have said: their tokens are independent all the same."""
    rows, new = 512, 6
    target, prompt, sampling = tabular_model(seed=0, vocab=4, scale=1.0), [3, 1, 3, 1], Sampling(1.0)
    draft = NGramDraft(2, min_ngram=1, siblings=6)
    settings = dict(target=target, max_new_tokens=new, eos_ids=[], samples=rows, length=FixedLength(2))
    rollouts = _decode(draft, Rejection(), sampling, prompts=[prompt, prompt], smallest_bucket=2 * rows, **settings)
    law = sequence_law(target, sampling, prompt, new)
    cases = [
        (rollouts.tokens[:, :3], law.sum((3, 4, 5))),
        (rollouts.tokens[:, 3:], law.sum((0, 1, 2))),
        # A row and the one that it listens to, at the same place.
        (np.stack([rollouts.tokens[0::2, 4], rollouts.tokens[1::2, 4]], 1), _pairs(law.sum((0, 1, 2, 3, 5)))),
    ]
    for tokens, expected in cases:
        counts = np.zeros(expected.shape)
        np.add.at(counts, tuple(tokens.T), 1)
        assert stats.chisquare(counts.ravel(), len(tokens) * expected.ravel()).pvalue > 1e-3
    assert 0.1 < rollouts.statistics.acceptance_rate < 0.9
    np.testing.assert_allclose(rollouts.logprobs, teacher_forced_logprobs(target, sampling, rollouts), atol=1e-5)


def _pairs(law: np.ndarray) -> np.ndarray:
    return law[:, None] * law


#
# As a module
#


def test_remembering_changes_no_shape_and_no_other_draft():
    rollouts = make_rollouts([[1, 2]], [0, 0], [[3, 4, 5], [6]])
    draft = NGramDraft(2, memory_size=3, memory_length=2)
    told = remember(draft, rollouts)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), told) == jax.tree.map(lambda x: (x.shape, x.dtype), draft)
    np.testing.assert_array_equal(told.memory.tokens, [[3, 4], [6, 0], [0, 0]])
    np.testing.assert_array_equal(draft.memory.lengths, 0)
    heads = HydraHeads(4, 2, key=jr.key(0))
    assert eqx.tree_equal(remember(heads, rollouts), heads) and remember(NoDraft(), rollouts) == NoDraft()
    assert remember(NGramDraft(2, memory_size=0), rollouts).memory.tokens.shape == (0, 256)


def test_there_is_nothing_to_train():
    draft = NGramDraft(LENGTH)
    assert draft.train_length == 0 and not jax.tree.leaves(eqx.filter(draft, eqx.is_inexact_array))
    hidden = draft.train_hidden(TARGET, Features(jnp.zeros((2, 5, 16))), jnp.zeros((2, 5), jnp.int32))
    assert hidden.shape == (2, 5, 0, 16)


def test_saved_memory_comes_back_to_the_bit(tmp_path):
    draft = NGramDraft(2, max_ngram=5, min_ngram=3, siblings=4, memory_size=3, memory_length=6, recalled=1)
    draft = remember(draft, make_rollouts([[1, 2]], [0, 0], [[3, 4, 5], [6]]))
    save_draft(tmp_path, draft, TARGET, "tiny")
    loaded = load_draft(tmp_path, TARGET)
    assert eqx.tree_equal(loaded, draft, typematch=True) and draft_kind(loaded) == "ngram"
    assert json.loads(json.dumps(draft.provenance())) == loaded.provenance()


def test_a_memory_of_another_vocabulary_is_refused():
    draft = NGramDraft(2)
    draft.check(TARGET)
    with pytest.raises(DraftError, match="remembers token 13, .*has 13 tokens"):
        remember(draft, make_rollouts([[1]], [0], [[13]])).check(TARGET)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(max_length=0), "at least 1 token"),
        (dict(min_ngram=5), r"min_ngram \(5\) .* max_ngram \(4\)"),
        (dict(min_ngram=0), r"min_ngram \(0\)"),
        (dict(recalled=-1), "recalled is -1"),
        (dict(memory_length=0), "memory_length is 0"),
    ],
)
def test_impossible_settings_get_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        NGramDraft(**(dict(max_length=2) | changes))
