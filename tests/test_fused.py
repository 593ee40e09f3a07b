"""Layers that one product computes: their outputs lie in groups, files have them as before, and a part of the groups is
a smaller layer."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_specgrpo.drafts import EagleDraft, load_draft, save_draft
from eqx_specgrpo.models import Transformer, TransformerConfig, rope_tables
from eqx_specgrpo.models._fused import Fused, fused_gate_up, fused_qkv
from eqx_specgrpo.models._transformer import MLP, Attention

CONFIG = TransformerConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8,
    max_position_embeddings=32, qkv_bias=True, mlp_bias=True,
)  # fmt: skip


@pytest.mark.parametrize("order", [Fused((6, 2, 2), 2), Fused((5,)), fused_qkv(6, 2, 8), fused_gate_up(20)])
def test_groups_and_layers(order):
    """`parted` and `split` give back what `joined` and `merge` were given, along the first axis and the last."""
    parts = [np.arange(size * 3.0).reshape(size, 3) + 1000 * index for index, size in enumerate(order.sizes)]
    whole = order.joined(parts)
    for one, other in zip(order.parted(whole), parts, strict=True):
        np.testing.assert_array_equal(one, other)
    columns = [jnp.asarray(part.T) for part in parts]
    np.testing.assert_array_equal(order.merge(columns), whole.T)
    for one, other in zip(order.split(jnp.asarray(whole.T)), columns, strict=True):
        np.testing.assert_array_equal(one, other)
    # Each group has as much of each layer, in their order.
    first = whole[: order.group_size]
    np.testing.assert_array_equal(first, np.concatenate([part[: len(part) // order.groups] for part in parts]))


def test_groups_divide_the_layers():
    with pytest.raises(ValueError, match="4 groups do not divide"):
        Fused((8, 6), 4)


def test_half_of_the_groups_is_a_layer_of_half_the_size():
    """So tensor parallelism needs no more than a sum: the two halves' results add up to the whole's."""
    attention = Attention(CONFIG, key=jr.key(0))
    bias = 0.1 * jr.normal(jr.key(1), attention.qkv.bias.shape)
    attention = eqx.tree_at(lambda a: a.qkv.bias, attention, bias)
    x, positions = jr.normal(jr.key(2), (2, 5, 32)), jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    tables = rope_tables(positions, CONFIG)
    smaller = Attention(dataclasses.replace(CONFIG, num_heads=3, num_kv_heads=1), key=jr.key(0))
    smaller = eqx.tree_at(lambda a: a.qkv, smaller, jax.tree.map(lambda x: x[: x.shape[0] // 2], attention.qkv))
    for one, other, axis in zip(smaller.project(x, tables), attention.project(x, tables), (2, 1, 1), strict=True):
        expected = jnp.split(other, 2, axis=axis)[0]
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)
    mlp = MLP(dataclasses.replace(CONFIG, intermediate_size=64, mlp_bias=False), key=jr.key(3))
    smaller = MLP(dataclasses.replace(CONFIG, intermediate_size=32, mlp_bias=False), key=jr.key(3))
    halves = []
    for first in (0, 32):
        weights = mlp.gate_up.weight[2 * first : 2 * (first + 32)], mlp.down.weight[:, first : first + 32]
        halves.append(eqx.tree_at(lambda m: (m.gate_up.weight, m.down.weight), smaller, weights)(x))
    np.testing.assert_allclose(halves[0] + halves[1], mlp(x), rtol=1e-4, atol=1e-5)


def test_a_draft_of_the_first_format(tmp_path):
    """In its file the layers lie one after the other; it is read as the same draft."""
    target = Transformer(dataclasses.replace(CONFIG, qkv_bias=False, mlp_bias=False), key=jr.key(0))
    draft = EagleDraft.for_target(target, max_length=3, key=jr.key(1))
    before = eqx.tree_at(
        lambda d: (d.layer.block.attention.qkv.weight, d.layer.block.mlp.gate_up.weight),
        draft,
        (
            jnp.concatenate(draft.layer.block.attention.fused.parted(draft.layer.block.attention.qkv.weight)),
            jnp.concatenate(draft.layer.block.mlp.fused.parted(draft.layer.block.mlp.gate_up.weight)),
        ),
    )
    save_draft(tmp_path, before, target, "a target")
    about = json.loads((tmp_path / "draft.json").read_text())
    assert eqx.tree_equal(load_draft(tmp_path, target), before)
    del about["format"]
    (tmp_path / "draft.json").write_text(json.dumps(about))
    assert eqx.tree_equal(load_draft(tmp_path, target), draft)
