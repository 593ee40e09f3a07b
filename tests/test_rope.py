"""Rotary tables: their values, and that a compiled model computes them once."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny_transformer

from eqx_specgrpo.models import rope_frequencies, rope_table


def test_a_table_holds_cosines_and_sines_of_the_angles():
    frequencies = rope_frequencies(64, 10000.0, None)
    positions = np.array([[0, 1, 2, 500, 2047]])
    table = jax.jit(lambda p: rope_table(p, frequencies))(jnp.asarray(positions))
    angles = positions[..., None].astype(np.float64) * frequencies
    # An angle of 2047 radians is itself rounded by 6e-5 in float32.
    for got, expected in zip(table, (np.cos(angles), np.sin(angles)), strict=True):
        np.testing.assert_allclose(np.asarray(got)[:, :3], expected[:, :3], atol=1e-6)
        np.testing.assert_allclose(got, expected, atol=2e-4)


def test_a_compiled_model_computes_the_table_once_and_not_in_each_layer():
    def cosines(layers):
        model = tiny_transformer(num_layers=layers)
        tokens = jnp.zeros((2, 3), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(3), (2, 3))
        forward = eqx.filter_jit(lambda m, p: m.hidden(tokens, p, m.no_cache())[0].last)
        return len(re.findall(r" cosine\(", forward.lower(model, positions).compile().compiled.as_text()))

    assert 0 < cosines(1) == cosines(4)
