"""The draft with a cache of its own: what it knows after any rounds is what a fresh start, and training, would know."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, randomise, tiny_transformer
from jaxtyping import Array, Int

from eqx_specgrpo.decoding import (
    AbstractLengthController,
    Coupled,
    FixedLength,
    SegmentPlan,
    decode,
    teacher_forced_logprobs,
)
from eqx_specgrpo.distill import DraftBatch, ForwardKL, draft_gradients
from eqx_specgrpo.drafts import AbstractSampler, DraftError, EagleDraft, draft_kind, load_draft, save_draft
from eqx_specgrpo.models import Features, sequence_features
from eqx_specgrpo.sampling import Categorical, GreedySampling

HIDDEN, LAYERS, MOST = 16, (0, 1), 4
ROWS, SEQ, CAPACITY = 4, 36, 48
PROMPTS = np.array([5, 1, 3, 6])
# Tokens drafted, and accepted of them in each row. Everything rejected, everything accepted, and plain rounds between.
ROUNDS = [
    (4, [0, 2, 4, 1]),
    (0, [0, 0, 0, 0]),
    (4, [4, 4, 4, 4]),
    (4, [4, 0, 3, 4]),
    (0, [0, 0, 0, 0]),
    (0, [0, 0, 0, 0]),
    (2, [1, 0, 2, 2]),
    (2, [0, 2, 1, 0]),
    (4, [1, 3, 0, 4]),
]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def fresh(*, key=None, **changes) -> EagleDraft:
    """A small draft."""
    settings = dict(hidden_size=HIDDEN, layers=LAYERS, max_length=MOST, train_length=MOST)
    sizes = dict(width=12, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=20)
    return EagleDraft(**(settings | sizes | changes), key=jr.key(1) if key is None else key)


def eagle(**changes) -> EagleDraft:
    """With every parameter randomised: the last one too, which is zero in a fresh draft."""
    return randomise(eqx.filter_eval_shape(ft.partial(fresh, **changes), key=jr.key(0)), 1, 0.35)


TARGET = tiny_transformer()
DRAFT = eagle()


class Dictated(AbstractSampler):
    """Draws nothing: the drafted tokens are given."""

    tokens: Int[Array, "rows draft"]

    def __call__(self, logits, offset, support=None):
        return self.tokens[:, offset], Categorical.from_logits(logits)


@eqx.filter_jit
def _features(tokens):
    return sequence_features(TARGET, tokens, layers=LAYERS)


@eqx.filter_jit
def _init(draft, features, tokens, lengths):
    return draft.init(TARGET, features, tokens, lengths, CAPACITY)


@eqx.filter_jit
def _target_cache(tokens):
    """Filled with the whole sequences, so that a round finds what lies before it; what lies behind it is masked."""
    positions = jnp.broadcast_to(jnp.arange(SEQ)[None], tokens.shape)
    return TARGET.hidden(tokens, positions, TARGET.init_cache(ROWS, CAPACITY, jnp.float32))[1]


@eqx.filter_jit
def _train(draft, features, tokens):
    hidden = draft.train_hidden(TARGET, features, tokens)
    return hidden, draft.train_logits(TARGET, hidden)


@eqx.filter_jit
def _propose(draft, state, last_token, tokens):
    return draft.propose(TARGET, state, last_token, Dictated(tokens), tokens.shape[1])


@eqx.filter_jit
def _round(draft, state, cache, positions, block, num_accepted):
    """A round as the decoder has it, with what is drafted and accepted given."""
    proposed = state
    if block.shape[1] > 1:
        _, proposed = draft.propose(TARGET, state, block[:, 0], Dictated(block[:, 1:]), block.shape[1] - 1)
    features, cache = TARGET.hidden(block, positions[:, None] + jnp.arange(block.shape[1])[None], cache, layers=LAYERS)
    return proposed, draft.commit(TARGET, proposed, features, block, num_accepted), cache


@ft.cache
def _sequences() -> np.ndarray:
    return np.random.default_rng(0).integers(0, TARGET.vocab_size, (ROWS, SEQ), np.int32)


@ft.cache
def _trained() -> np.ndarray:
    tokens = jnp.asarray(_sequences())
    return np.asarray(_train(DRAFT, _features(tokens), tokens)[1])


def _window(start: np.ndarray, size: int) -> np.ndarray:
    return _sequences()[np.arange(ROWS)[:, None], start[:, None] + np.arange(size)]


def _follow(commit=lambda before, proposed, after: after):
    """Goes along given sequences in the rounds of `ROUNDS`. At the start and after each: the state, the number of
    tokens before the last committed one, and how far the draft's logits are from what training computes.

    **Arguments:**

    - `commit`: what becomes of the state before the round, after proposing and after committing.
    """
    tokens = jnp.asarray(_sequences())
    known = PROMPTS.copy()
    state = _init(DRAFT, _features(tokens), tokens, jnp.asarray(known))
    cache = _target_cache(tokens)
    for length, accepted in [(None, None), *ROUNDS]:
        if length is not None:
            block = _window(known, length + 1)
            rejected = np.arange(length + 1)[None] > np.array(accepted)[:, None]
            block = np.where(rejected, (block + 1 + np.arange(length + 1)) % TARGET.vocab_size, block)
            outcome = jnp.asarray(known), jnp.asarray(block), jnp.asarray(accepted)
            proposed, after, cache = _round(DRAFT, state, cache, *outcome)
            state = commit(state, proposed, after)
            known = known + 1 + np.array(accepted)
        window = _window(known, MOST + 1)
        proposal, _ = _propose(DRAFT, state, jnp.asarray(window[:, 0]), jnp.asarray(window[:, 1:]))
        expected = _trained()[np.arange(ROWS), known - 1]
        yield state, known, np.abs(np.asarray(proposal.distribution.logits) - expected).max()


def test_decoding_computes_what_training_computes_after_any_rounds():
    gaps = [gap for _, _, gap in _follow()]
    assert len(gaps) == 1 + len(ROUNDS)
    assert max(gaps) < 1e-4
    assert np.ptp(_trained(), axis=-1).min() > 1  # there is something to be wrong about


def test_the_state_after_any_rounds_is_that_of_a_fresh_start():
    tokens = jnp.asarray(_sequences())
    features = _features(tokens)
    for state, known, _ in _follow():
        fresh = _init(DRAFT, features, tokens, jnp.asarray(known))
        np.testing.assert_array_equal(state.positions, known - 1)
        assert all(x.shape[0] == ROWS for x in jax.tree.leaves(state))
        np.testing.assert_array_equal(state.positions, fresh.positions)
        np.testing.assert_allclose(state.fused, fresh.fused, atol=1e-4)
        np.testing.assert_allclose(state.last, fresh.last, atol=1e-4)
        for row, position in enumerate(known - 1):
            for found, expected in ((state.cache.keys, fresh.cache.keys), (state.cache.values, fresh.cache.values)):
                np.testing.assert_allclose(found[row, :, :position], expected[row, :, :position], atol=1e-4)


def _moved(by: int):
    return lambda before, proposed, after: eqx.tree_at(lambda s: s.positions, after, after.positions + by)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(_moved(1), id="cursor one too far"),
        pytest.param(_moved(-1), id="cursor one short"),
        pytest.param(
            lambda before, proposed, after: eqx.tree_at(lambda s: s.cache, after, proposed.cache), id="own entries kept"
        ),
        pytest.param(
            lambda before, proposed, after: eqx.tree_at(lambda s: s.fused, after, before.fused), id="features of before"
        ),
    ],
)
def test_the_comparison_catches_a_wrong_commit(broken):
    first, *after_rounds = [gap for _, _, gap in _follow(broken)]
    assert first < 1e-4 < 1e-2 < min(after_rounds)


def test_what_is_drafted_later_depends_on_what_was_drafted_before():
    """The logits at offset `k` change with the token drafted at `k - 1`, in every row, and with none from `k` on."""
    tokens = jnp.asarray(_sequences())
    state = _init(DRAFT, _features(tokens), tokens, jnp.asarray(PROMPTS))
    window = jnp.asarray(_window(PROMPTS, MOST + 1))

    def logits(drafted):
        return np.asarray(_propose(DRAFT, state, window[:, 0], drafted)[0].distribution.logits)

    reference = logits(window[:, 1:])
    changed = np.abs(logits(window[:, 1:].at[:, 1].add(1) % TARGET.vocab_size) - reference).max(-1)
    assert (changed[:, :2] == 0).all() and (changed[:, 2:] > 1e-3).all()


def test_a_finished_row_stays_within_the_cache():
    """Rows are committed to until the batch shrinks; a write past the end would be clamped onto valid entries."""
    tokens = jnp.asarray(_sequences())
    state = _init(DRAFT, _features(tokens), tokens, jnp.asarray(PROMPTS))
    cache = _target_cache(tokens)
    for _ in range(2 + CAPACITY // (MOST + 1)):
        block = jnp.asarray(_window(PROMPTS, MOST + 1))
        _, state, cache = _round(DRAFT, state, cache, jnp.asarray(PROMPTS), block, jnp.array([MOST, 0, MOST, MOST]))
        assert state.positions.max() + MOST + 1 <= CAPACITY
    assert state.positions[0] == CAPACITY - MOST - 1 > state.positions[1]


def test_a_fresh_draft_repeats_the_targets_own_prediction():
    tokens = jnp.asarray(_sequences())
    features = _features(tokens)
    hidden, _ = _train(fresh(), features, tokens)
    np.testing.assert_array_equal(hidden, np.repeat(np.asarray(features.last)[:, :, None], MOST, axis=2))


def test_fewer_steps_of_training_are_the_first_of_more():
    tokens = jnp.asarray(_sequences())
    few, _ = _train(eagle(train_length=2), _features(tokens), tokens)
    np.testing.assert_allclose(few, _train(DRAFT, _features(tokens), tokens)[0][:, :, :2], atol=1e-5)


def test_a_draft_for_a_target_has_the_sizes_of_its_layers():
    target = eqx.filter_eval_shape(tiny_transformer, num_layers=30)
    draft = eqx.filter_eval_shape(EagleDraft.for_target, target, max_length=MOST, key=jr.key(0))
    draft.check(target)
    assert (draft.layers, draft.max_length, draft.train_length) == ((3, 15, 27), MOST, 3)
    shapes = [jax.tree.map(lambda x: x.shape, block) for block in (draft.layer.block, target.blocks[0])]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])


def test_gradients_reach_every_parameter_and_the_target_is_none_of_them():
    tokens = jnp.asarray(_sequences()[:, :12])
    batch = DraftBatch(_features(tokens), tokens, jnp.full(ROWS, 3), jnp.full(ROWS, 9))
    settings = dict(temperature=jnp.float32(1.0), alpha=jnp.ones(MOST), position_decay=jnp.float32(0.8), new=9)
    result = draft_gradients(DRAFT, TARGET, batch, ForwardKL(), **settings)
    for path, gradient in jax.tree_util.tree_leaves_with_path(result.gradients):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-6, jax.tree_util.keystr(path)
    assert np.isfinite(result.loss) and result.acceptance.shape == (MOST,)
    assert all(TARGET.vocab_size not in x.shape for x in jax.tree.leaves(eqx.filter(DRAFT, eqx.is_array)))


class Alternating(AbstractLengthController[int]):
    """Lengths 0, 2 and 3 in turn, a segment of three rounds each."""

    def init(self, max_length):
        return 0

    def choose(self, state, rows, context):
        return SegmentPlan((0, 2, 3)[state % 3], 3)

    def update(self, state, observation):
        return state + 1

    def after_training(self, state, expected_acceptance):
        return state

    def with_future(self, state, left):
        return state

    def round_seconds(self, state, rows, length, context):
        return None

    def metrics(self, state):
        return {}


TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@ft.cache
def _coupled(length: int | None):
    controller = Alternating() if length is None else FixedLength(length)
    return decode(
        TARGET,
        TEXTS,
        draft=DRAFT if length != 0 else None,
        verifier=Coupled(),
        length=controller,
        key=jr.key(7),
        max_new_tokens=24,
        eos_ids=[12],
        samples=4,
        smallest_bucket=12,  # no shrinking: fewer programs
    )


@pytest.mark.parametrize("length", [1, 3, None], ids=["1", "3", "alternating"])
def test_the_tokens_are_those_of_plain_decoding(length):
    plain, found = _coupled(0), _coupled(length)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(found.stop_reasons, plain.stop_reasons)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)
    assert (found.statistics.accepted.sum(0)[: length or 2] > 0).all()


def test_greedy_decoding_is_that_without_a_draft():
    settings = dict(sampling=GreedySampling(), key=jr.key(8), max_new_tokens=20, eos_ids=[2], samples=2)
    settings |= dict(smallest_bucket=6)  # no shrinking: fewer programs
    plain = decode(TARGET, TEXTS, **settings)
    found = decode(TARGET, TEXTS, draft=DRAFT, length=FixedLength(2), **settings)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(found.stop_reasons, plain.stop_reasons)
    assert len(set(plain.lengths.tolist())) > 1
    counts = np.arange(20)[None] < found.lengths[:, None]
    gap = np.abs(teacher_forced_logprobs(TARGET, GreedySampling(), found) - found.logprobs)[counts]
    assert gap.max() < 1e-5


def test_a_saved_draft_comes_back_to_the_bit(tmp_path):
    save_draft(tmp_path / "draft", DRAFT, TARGET, "tiny")
    found = load_draft(tmp_path / "draft", TARGET)
    assert eqx.tree_equal(found, jax.tree.map(jnp.asarray, DRAFT), typematch=True)
    assert draft_kind(found) == "eagle"


def test_drafts_and_targets_that_do_not_fit_are_refused():
    with pytest.raises(DraftError, match="size 8.*size 16"):
        eagle(hidden_size=8).check(TARGET)
    with pytest.raises(DraftError, match=r"layers \(0, 2\).*target has 2"):
        eagle(layers=(0, 2)).check(TARGET)
    with pytest.raises(ValueError, match="from 0"):
        fresh(layers=(-1,))
    for settings in (dict(max_length=9), dict(train_length=5), dict(train_length=0)):
        with pytest.raises(ValueError, match="1 <= train_length <= max_length <= 8"):
            fresh(**settings)
    tokens = jnp.asarray(_sequences())
    with pytest.raises(DraftError, match="outputs of 0 layers.*layers=draft.layers"):
        DRAFT.train_hidden(TARGET, Features(_features(tokens).last), tokens)
    state = _init(DRAFT, _features(tokens), tokens, jnp.asarray(PROMPTS))
    with pytest.raises(ValueError, match="5 tokens .* max_length of 4"):
        DRAFT.propose(TARGET, state, tokens[:, 0], Dictated(tokens), 5)
