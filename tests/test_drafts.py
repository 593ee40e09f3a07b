"""Drafts themselves: what they propose from which features, and how they are saved."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import normalized, quick_compilation, randomise, tiny_transformer

from eqx_specgrpo._types import Prompts
from eqx_specgrpo.decoding import Rejection, _row_programs as row_programs, decode_round
from eqx_specgrpo.decoding._room import Room
from eqx_specgrpo.drafts import DraftError, IndependentSampler, MedusaHeads, NoDraft, draft_kind, load_draft, save_draft
from eqx_specgrpo.errors import CheckpointError
from eqx_specgrpo.models import Features, sequence_features
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
    return randomise(MedusaHeads.fresh(HIDDEN, HEADS), 0, 0.3)


@eqx.filter_jit
def _features(target, tokens):
    return sequence_features(target, tokens)


@eqx.filter_jit
def _propose(draft, target, state, length, sampling=Sampling(1.0)):
    last_token = jnp.zeros(state.shape[0], jnp.int32)
    sampler = IndependentSampler(sampling, jr.split(jr.key(0), state.shape[0]))
    return draft.propose(target, state, last_token, sampler, length)


def _sequences(target, rows, length) -> np.ndarray:
    return np.random.default_rng(0).integers(0, target.vocab_size, (rows, length), np.int32)


def test_fresh_heads_repeat_the_targets_own_prediction(target):
    fresh = MedusaHeads.fresh(HIDDEN, HEADS)
    features = _features(target, _sequences(target, 2, 8))
    hidden = fresh.train_hidden(target, features, jnp.zeros((2, 8), jnp.int32))
    expected = np.repeat(np.asarray(features.last)[:, :, None], HEADS, axis=2)
    np.testing.assert_array_equal(hidden, expected)
    logits = fresh.train_logits(target, hidden)
    np.testing.assert_array_equal(logits, target.unembed(jnp.asarray(expected)))

    proposal, _ = _propose(fresh, target, features.last[:, 3], HEADS, GreedySampling())
    best = np.asarray(jnp.argmax(target.unembed(features.last[:, 3]), axis=-1))
    np.testing.assert_array_equal(proposal.tokens, np.repeat(best[:, None], HEADS, axis=1))


def test_a_head_is_one_residual_block(target, heads):
    features = _features(target, _sequences(target, 2, 4))
    hidden = np.asarray(features.last, np.float64)
    found = heads.train_hidden(target, features, jnp.zeros((2, 4), jnp.int32))
    for index in range(HEADS):
        inner = hidden @ np.asarray(heads.weight[index], np.float64).T + np.asarray(heads.bias[index], np.float64)
        np.testing.assert_allclose(found[:, :, index], hidden + inner / (1 + np.exp(-inner)), rtol=1e-4, atol=1e-4)


def test_proposals_are_what_training_sees(target, heads):
    """At every position, from the same features; and with fewer heads than there are, the first of them."""
    tokens = _sequences(target, 2, 8)
    features = _features(target, tokens)
    trained = heads.train_logits(target, heads.train_hidden(target, features, jnp.asarray(tokens)))
    assert trained.shape == (2, 8, HEADS, target.vocab_size)
    for length in (1, HEADS):
        flat = features.last.reshape(16, HIDDEN)
        proposal, state = _propose(heads, target, flat, length)
        np.testing.assert_array_equal(state, flat)
        expected = np.asarray(trained).reshape(16, HEADS, -1)[:, :length]
        np.testing.assert_allclose(normalized(proposal.distribution.logits), normalized(expected), atol=1e-4)
        logprobs = np.asarray(jax.nn.log_softmax(expected))
        of_tokens = np.take_along_axis(logprobs, np.asarray(proposal.tokens)[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(proposal.token_logprobs(), of_tokens, atol=1e-4)


def test_drafted_tokens_are_drawn_from_the_distribution_that_is_returned(target, heads):
    """Under truncation no token outside it is drafted, and each row and position draws by itself."""
    state = jnp.broadcast_to(_features(target, _sequences(target, 1, 4)).last[0, 2], (500, HIDDEN))
    proposal, _ = _propose(heads, target, state, HEADS, Sampling(1.0, top_k=4))
    assert np.isfinite(proposal.token_logprobs()).all()
    probs = np.asarray(proposal.distribution.probs())[0]
    for index in range(HEADS):
        frequencies = np.bincount(np.asarray(proposal.tokens)[:, index], minlength=target.vocab_size) / 500
        assert np.abs(frequencies - probs[index]).max() < 0.1
    assert len(np.unique(proposal.tokens, axis=0)) > 8


def test_commit_keeps_the_features_that_predicted_the_last_token(target, heads):
    features = Features(jnp.arange(3 * 4 * HIDDEN, dtype=jnp.float32).reshape(3, 4, HIDDEN))
    block = jnp.zeros((3, 4), jnp.int32)
    state = heads.commit(target, jnp.zeros((3, HIDDEN)), features, block, jnp.array([0, 3, 2]))
    np.testing.assert_array_equal(state, np.stack([features.last[0, 0], features.last[1, 3], features.last[2, 2]]))
    state = heads.init(target, features, block, jnp.array([1, 4, 2]), 10)
    np.testing.assert_array_equal(state, np.stack([features.last[0, 0], features.last[1, 3], features.last[2, 1]]))


def test_in_decoding_the_state_is_where_training_looks(target, heads):
    """Before each round a row's state is the features at `i`, its last committed token is `i + 1`, and `i + 2 + k` is
    what head `k` drafts: the offsets of `train_hidden`.
    """
    prompts = Prompts.from_lists([[1, 2, 3], [4], [5, 6, 7, 8, 9]])
    eos, new, rows = jnp.array([-1], jnp.int32), 20, 3
    modules = (target, heads, Rejection(), Sampling(1.0))
    state, store, _ = row_programs.prefill(
        (*modules, eos),
        jnp.asarray(prompts.tokens),
        jnp.asarray(prompts.lengths),
        jnp.full(rows, new, jnp.int32),
        jr.key(3),
        jnp.arange(rows),
        jnp.arange(rows),
        room=Room(new + HEADS + 1, 5 + new + HEADS + 1),
        capacity=5 + new + HEADS + 1,
        cache_dtype="float32",
        share=False,
        keep_prompts=False,
    )
    a_round = eqx.filter_jit(lambda state: decode_round(*modules, eos, store, state, HEADS))
    accepted = set()
    for _ in range(5):
        num_new = np.asarray(state.num_new)
        sequences = np.zeros((rows, 16 + new), np.int32)
        for row, length in enumerate(prompts.lengths):
            sequences[row, :length] = prompts.tokens[row, :length]
            sequences[row, length : length + num_new[row]] = state.tokens[row, : num_new[row]]
        newest = prompts.lengths + num_new - 2
        np.testing.assert_array_equal(state.last_token, sequences[np.arange(rows), newest + 1])
        expected = np.asarray(_features(target, sequences).last)[np.arange(rows), newest]
        np.testing.assert_allclose(state.draft, expected, atol=2e-5)
        state = a_round(state)
        accepted |= set((np.asarray(state.num_new) - num_new).tolist())
    assert len(accepted) > 1, "every round advanced alike: rows of the block other than one were never picked"


def test_no_draft_guesses_nothing(target):
    draft = NoDraft()
    features = _features(target, _sequences(target, 2, 4))
    state = draft.init(target, features, jnp.zeros((2, 4), jnp.int32), jnp.array([4, 4]), 10)
    sampler = IndependentSampler(Sampling(1.0), jr.split(jr.key(0), 2))
    proposal, _ = draft.propose(target, state, jnp.zeros(2, jnp.int32), sampler, 0)
    assert proposal.tokens.shape == (2, 0) and proposal.distribution is None and draft.max_length == 0
    assert draft.train_hidden(target, features, jnp.zeros((2, 4), jnp.int32)).shape == (2, 4, 0, HIDDEN)
    assert jax.tree.leaves(state) == []


#
# On disk
#


def test_saving_and_loading_is_exact(tmp_path, target, heads):
    save_draft(tmp_path / "draft", heads, target, "tiny")
    loaded = load_draft(tmp_path / "draft", target)
    assert eqx.tree_equal(loaded, heads, typematch=True)
    about = json.loads((tmp_path / "draft" / "draft.json").read_text())
    assert about["kind"] == draft_kind(heads) == "medusa" and about["target"]["name"] == "tiny"


def test_heads_of_the_wrong_size_are_refused(target):
    with pytest.raises(DraftError, match="size 8, but the target's have size 16"):
        MedusaHeads.fresh(8, HEADS).check(target)


@pytest.mark.parametrize(
    "changes, sizes", [(dict(hidden_size=8), "hidden_size 16, .* is 8"), (dict(vocab_size=9), "vocab_size 13, .* is 9")]
)
def test_a_draft_made_for_another_target_is_refused(tmp_path, target, heads, changes, sizes):
    save_draft(tmp_path, heads, target, "tiny")
    with pytest.raises(DraftError, match=f"was trained for 'tiny' with {sizes}"):
        load_draft(tmp_path, eqx.filter_eval_shape(tiny_transformer, **changes))


def _about(tmp_path, **changes):
    path = tmp_path / "draft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE = {
    "no folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no weights": lambda folder: (folder / "draft.safetensors").unlink(),
    "truncated weights": lambda folder: _truncate(folder / "draft.safetensors"),
    "rubbish for weights": lambda folder: (folder / "draft.safetensors").write_text("no"),
    "truncated description": lambda folder: _truncate(folder / "draft.json"),
    "a list for a description": lambda folder: (folder / "draft.json").write_text("[]"),
    "not text": lambda folder: (folder / "draft.json").write_bytes(b"\xff\xfe"),
    "unknown kind": lambda folder: _about(folder, kind="eagle"),
    "no settings": lambda folder: _about(folder, settings={}),
    "settings of the wrong type": lambda folder: _about(folder, settings={"hidden_size": "16", "num_heads": 3}),
    "settings that are no table": lambda folder: _about(folder, settings=3),
    "a target that is no table": lambda folder: _about(folder, target="tiny"),
    "other heads than the weights": lambda folder: _about(folder, settings={"hidden_size": 16, "num_heads": 2}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_gets_a_sentence(tmp_path, target, heads, damage):
    save_draft(tmp_path, heads, target, "tiny")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_draft(tmp_path, target)
