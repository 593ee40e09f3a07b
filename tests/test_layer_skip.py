"""The target's own first layers as the draft, with an adapter that learns."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from chain_rounds import check_every_kind_of_round, check_training_logits
from helpers import quick_compilation, randomise, tabular_model, tiny_transformer

from eqx_specgrpo.decoding import Coupled, FixedLength, decode
from eqx_specgrpo.distill import DraftBatch, ForwardKL, draft_gradients
from eqx_specgrpo.drafts import DraftError, EarlyExit, LayerSkipDraft, draft_kind, load_draft, save_draft
from eqx_specgrpo.models import sequence_features

HIDDEN, LENGTH, NEW = 16, 3, 21


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


TARGET = tiny_transformer()
DRAFTS = {
    "all layers": LayerSkipDraft(HIDDEN, 2, LENGTH, key=jr.key(0)),
    "one layer": randomise(eqx.filter_eval_shape(LayerSkipDraft, HIDDEN, 1, LENGTH, 24, key=jr.key(0)), 1, 0.2),
    "none": None,
}


@ft.cache
def _decode(draft: str):
    return decode(
        TARGET,
        [[1, 2, 3], [4, 5], [6, 7, 8, 9]],
        draft=DRAFTS[draft],
        verifier=Coupled(),
        length=FixedLength(LENGTH),
        key=jr.key(9),
        max_new_tokens=NEW,
        samples=4,
        smallest_bucket=16,
    )


def test_with_all_layers_and_a_fresh_adapter_everything_is_accepted():
    statistics = _decode("all layers").statistics
    np.testing.assert_array_equal(statistics.accepted, statistics.drafted)
    assert statistics.acceptance_length == LENGTH + 1


def test_the_tokens_are_those_of_plain_decoding():
    plain, found = _decode("none"), _decode("one layer")
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(_decode("all layers").tokens, plain.tokens)
    assert 0 < found.statistics.accepted.sum() < found.statistics.drafted.sum()


def _early_exit(draft: LayerSkipDraft) -> EarlyExit:
    return EarlyExit(TARGET.first_layers(draft.num_layers), draft.adapter)


def test_every_kind_of_round_leaves_the_cache_right():
    check_every_kind_of_round(DRAFTS["one layer"], TARGET, _early_exit(DRAFTS["one layer"]))


def test_a_fresh_adapter_is_the_pure_early_exit():
    """The first layer's output through the final norm; with another adapter something else."""
    fresh, learned = LayerSkipDraft(HIDDEN, 1, LENGTH, 24, key=jr.key(0)), DRAFTS["one layer"]
    tokens = jr.randint(jr.key(1), (2, 7), 0, TARGET.vocab_size, jnp.int32)

    @eqx.filter_jit
    def logits(target, *drafts):
        features = sequence_features(target, tokens, layers=fresh.layers)
        shallow = [sequence_features(_early_exit(draft), tokens, layers=(0,)) for draft in drafts]
        exited = target.unembed(target.norm(features.layers[0]))
        return exited, features.layers[0], [(target.unembed(x.last), x.layers[0]) for x in shallow]

    exited, residual, (of_fresh, of_learned) = logits(TARGET, fresh, learned)
    np.testing.assert_allclose(of_fresh[0], exited, atol=1e-5)
    np.testing.assert_allclose(of_fresh[1], residual, atol=1e-5)
    assert np.abs(of_learned[0] - exited).max() > 0.1


def test_the_first_layers_are_a_transformer_of_their_own():
    shallow = TARGET.first_layers(1)
    assert shallow.config.num_layers == len(shallow.blocks) == len(shallow.no_cache()) == 1
    assert eqx.tree_equal(TARGET.first_layers(2), TARGET)
    assert jax.tree.leaves(shallow)[0] is jax.tree.leaves(TARGET)[0]


def test_training_logits_are_the_drafting_logits():
    check_training_logits(DRAFTS["one layer"], TARGET, HIDDEN)


def test_the_adapter_learns_and_nothing_of_the_target():
    draft = DRAFTS["one layer"]
    assert {leaf.shape for leaf in jax.tree.leaves(draft)} == {(24, 16), (24,), (16, 24), (16,)}
    tokens = jr.randint(jr.key(2), (3, 14), 0, TARGET.vocab_size, jnp.int32)
    features = eqx.filter_jit(sequence_features)(TARGET, tokens, layers=draft.layers)
    batch = DraftBatch(features, tokens, jnp.array([3, 5, 2]), jnp.array([9, 1, 8]))
    settings = dict(temperature=jnp.float32(1.0), alpha=jnp.zeros(1), position_decay=jnp.float32(0.8), new=10, chunk=16)
    gradients = jax.tree.leaves(draft_gradients(draft, TARGET, batch, ForwardKL(), **settings).gradients)
    assert len(gradients) == 4 and all(np.abs(gradient).max() > 1e-6 for gradient in gradients)

    # Without the stop-gradient that distillation puts around the target as well.
    @eqx.filter_jit
    @eqx.filter_grad
    def of_target(inputs):
        target, features = inputs
        return jnp.sum(draft.train_logits(target, draft.train_hidden(target, features, tokens)) ** 2)

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_target((TARGET, features))))


def test_an_adapter_of_a_large_residual_stream_learns_at_the_same_rate():
    """What it adds grows with the stream, so that the angle it turns by does not depend on the model's scale."""
    adapter = DRAFTS["one layer"].adapter
    x = jr.normal(jr.key(0), (5, HIDDEN))
    np.testing.assert_allclose(adapter(1000 * x), 1000 * adapter(x), rtol=1e-4, atol=1e-2)
    assert np.isfinite(jax.grad(lambda x: adapter(x).sum())(jnp.zeros((1, HIDDEN)))).all()


def test_a_saved_draft_comes_back_to_the_bit(tmp_path):
    save_draft(tmp_path, DRAFTS["one layer"], TARGET, "tiny")
    assert eqx.tree_equal(load_draft(tmp_path, TARGET), DRAFTS["one layer"], typematch=True)
    assert draft_kind(DRAFTS["one layer"]) == "layer_skip"


@pytest.mark.parametrize("num_layers", [0, 3])
def test_layers_that_the_target_does_not_have_are_refused(num_layers):
    with pytest.raises(DraftError, match=f"first {num_layers} layers, but the target has 2"):
        LayerSkipDraft(HIDDEN, num_layers, LENGTH, key=jr.key(0)).check(TARGET)


def test_other_targets_are_refused():
    draft = DRAFTS["one layer"]
    with pytest.raises(DraftError, match="size 16, but the target's have size 8"):
        draft.check(eqx.filter_eval_shape(tiny_transformer, hidden_size=8))
    with pytest.raises(DraftError, match="Transformer, but the target is a TabularModel"):
        draft.check(tabular_model(seed=0, vocab=13, scale=1.0))
