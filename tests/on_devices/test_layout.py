"""Meshes, rules and placing on four devices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from eqx_specgrpo.errors import UserError
from eqx_specgrpo.layout import ROWS, WHOLE, DeviceMesh, Layout, OneDevice, make_mesh, path_name
from eqx_specgrpo.models import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64,
    max_position_embeddings=128,
)  # fmt: skip


def by_path(specs):
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P))
    return {path_name(path): spec for path, spec in leaves}


def test_what_a_mesh_is_made_of():
    assert isinstance(make_mesh(devices=jax.devices()[:1]), OneDevice)
    mesh = make_mesh(2)
    assert isinstance(mesh, DeviceMesh) and (mesh.data, mesh.model) == (2, 2)
    assert mesh.local() is mesh and mesh.devices == tuple(jax.devices())
    assert [make_mesh().padded(n) for n in (1, 4, 5)] == [4, 4, 8]
    with pytest.raises(UserError, match=r"devices.model = 3, but there are 4 devices.*\[1, 2, 4\]"):
        make_mesh(3)
    with pytest.raises(ValueError, match="Auto"):
        DeviceMesh(jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2))


def test_rules_follow_a_parameter_wherever_it_is():
    model = Transformer(CONFIG, key=jr.key(0))
    mesh = make_mesh(2)
    copy = by_path(mesh.specs(model, Layout.COPY))
    assert copy["blocks.1.attention.qkv.weight"] == P("model")
    assert copy["blocks.1.attention.output.weight"] == P(None, "model")
    assert copy["embedding"] == P()  # 37 tokens: whole, not an error
    assert copy["norm.weight"] == P()
    master = by_path(mesh.specs(model, Layout.MASTER))
    assert master["blocks.0.mlp.gate_up.weight"] == P("model", "data")
    assert master["blocks.0.mlp.down.weight"] == P("data", "model")
    assert master["norm.weight"] == P()  # too small to be worth it
    # An optimizer's moments lie where their parameters do, and its count is whole.
    state = optax.adam(1e-3).init(eqx.filter(model, eqx.is_array))
    moments = by_path(mesh.specs(state, Layout.MASTER))
    assert moments["0.mu.blocks.0.mlp.down.weight"] == master["blocks.0.mlp.down.weight"]
    assert moments["0.count"] == P()


@pytest.mark.parametrize("model", [1, 2])
def test_placed_and_constrained_arrays_are_the_same_numbers(model):
    mesh = make_mesh(model)
    weights = Transformer(CONFIG, key=jr.key(0))
    master = mesh.lay_out(weights, Layout.MASTER)
    assert eqx.tree_equal(jax.device_get(master), jax.device_get(weights))
    down = master.blocks[0].mlp.down.weight
    assert len({str(shard.index) for shard in down.addressable_shards}) == 4
    copy = eqx.filter_jit(mesh.laid_out)(master, Layout.COPY)
    assert copy.blocks[0].mlp.down.weight.sharding.is_equivalent_to(mesh.sharding(P(None, "model")), 2)
    assert eqx.tree_equal(jax.device_get(copy), jax.device_get(weights))
    keys = mesh.put({"key": jr.key(3), "rows": np.arange(8), "name": "x"}, WHOLE)
    assert keys["name"] == "x" and jr.key_data(keys["key"]).tolist() == jr.key_data(jr.key(3)).tolist()


def test_shards_run_what_one_device_runs():
    mesh = make_mesh()

    def function(weights, rows, name):
        assert name == "constant" and rows.shape == (2, 3)
        return rows @ weights, (mesh.maximum(rows.max()), mesh.total(rows.sum())), mesh.shard_index()[None]

    weights, rows = np.eye(3, dtype=np.float32), np.arange(24, dtype=np.float32).reshape(8, 3)
    program = eqx.filter_jit(mesh.by_shard(function, (WHOLE, ROWS, WHOLE), (ROWS, WHOLE, ROWS)))
    same, (most, total), shard = program(mesh.put(weights, WHOLE), mesh.put(rows, ROWS), "constant")
    np.testing.assert_array_equal(same, rows)
    assert (float(most), float(total), shard.tolist()) == (23.0, 276.0, [0, 1, 2, 3])


def test_one_device_leaves_everything_alone():
    mesh, weights = OneDevice(), Transformer(CONFIG, key=jr.key(0))
    assert mesh.lay_out(weights, Layout.MASTER).embedding is weights.embedding
    assert mesh.by_shard(jnp.sin, WHOLE, WHOLE) is jnp.sin
    assert mesh.local() is mesh and mesh.padded(7) == 7 and int(mesh.shard_index()) == 0
    assert isinstance(mesh.put(np.zeros(3), ROWS), jax.Array)
