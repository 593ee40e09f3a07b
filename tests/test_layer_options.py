"""Options that a Llama's layers have not: each shows, and decoding and training keep to all of them."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import EVERY_OPTION, quick_compilation, randomise, tiny_transformer

from eqx_specgrpo.decoding import Coupled, FixedLength, decode, teacher_forced_logprobs
from eqx_specgrpo.drafts import HydraHeads
from eqx_specgrpo.grpo._forward import _period
from eqx_specgrpo.models import LongRope, TransformerConfig, YarnRope, rope_tables, sequence_features
from eqx_specgrpo.sampling import Sampling


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def target():
    return tiny_transformer(**EVERY_OPTION)


def _logits(model, config):
    """Of the same weights under another configuration."""
    fresh = eqx.filter_eval_shape(type(model), config, key=jr.key(0))
    arrays, static = jax.tree.leaves(model), jax.tree.structure(fresh)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (1, 20)), jnp.int32)
    with jax.disable_jit():
        model = jax.tree.unflatten(static, arrays)
        return np.asarray(model.unembed(sequence_features(model, tokens).last))


def test_each_option_shows(target):
    """What makes the tests below able to fail."""
    before = _logits(target, target.config)
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    for name in EVERY_OPTION:
        if name not in ("num_layers", "norm_placement", "qk_norm", "qk_norm_across_heads"):  # Those change the arrays.
            changed = dataclasses.replace(target.config, **{name: defaults[name]})
            assert np.abs(_logits(target, changed) - before).max() > 1e-3, name


def test_layers_that_are_alike_are_the_same_function(target):
    kinds = [jax.tree.structure(block) for block in target.blocks]
    assert kinds[0] == kinds[3] and len(set(map(str, kinds))) == 3
    assert _period(target.blocks) == 3
    assert _period(tiny_transformer(num_layers=3).blocks) == 1
    mixed = tiny_transformer(num_layers=5, sliding_window=4, full_attention_layers=(1, 3))
    assert _period(mixed.blocks) == 2 and _period(mixed.blocks[:1]) == 1


def test_decoding(target):
    """Speculatively and with prompts stored once: at the log-probabilities that whole sequences give."""
    heads = randomise(eqx.filter_eval_shape(HydraHeads, 16, 3, key=jr.key(0)), 1, 0.3)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 3]]
    common = dict(verifier=Coupled(), sampling=Sampling(1.0), key=jr.key(4), max_new_tokens=14, eos_ids=[2], samples=4)
    found = decode(target, prompts, draft=heads, length=FixedLength(3), **common)
    assert len(set(found.lengths)) > 2
    counts = np.arange(14)[None] < found.lengths[:, None]
    expected = teacher_forced_logprobs(target, Sampling(1.0), found)
    np.testing.assert_allclose(found.logprobs[counts], expected[counts], atol=2e-5)


def test_the_first_layers_are_those_layers(target):
    shallow = target.first_layers(2)
    assert [block.attention.rope for block in shallow.blocks] == [1, None]
    assert [block.attention.sliding_window for block in target.blocks] == [6, 6, None, 6]
    tokens = jnp.arange(1, 12, dtype=jnp.int32)[None]
    of_all = sequence_features(target, tokens, layers=(1,)).layers[0]
    of_two = sequence_features(shallow, tokens, layers=(1,)).layers[0]
    np.testing.assert_array_equal(of_two, of_all)


def test_longrope_ends_where_its_other_divisors_would_begin():
    config = tiny_transformer(rope_scaling=LongRope((1.0, 3.0), (2.0, 9.0), 24, 1.25)).config
    assert (config.max_position_embeddings, config.max_length) == (64, 24)
    ((cos, sin),) = rope_tables(jnp.arange(4)[None], config)
    np.testing.assert_allclose(cos**2 + sin**2, 1.25**2, rtol=1e-6)
    np.testing.assert_allclose(sin[0, 1], 1.25 * np.sin([1.0, 0.01 / 3]), rtol=1e-5)
    with pytest.raises(ValueError, match="short_factor has 2 numbers, but 1 pairs"):
        dataclasses.replace(config, rotary_dim=2)
    with pytest.raises(ValueError, match=r"rotary_dim \(3\) must be even"):
        dataclasses.replace(config, rotary_dim=3, rope_scaling=YarnRope(2.0, 16, 1.0))
