"""Weights that are divided over `data`, made whole where they are used, and their gradients, summed where they are
kept (Rajbhandari et al. 2020, "ZeRO", section 5; Zhao et al. 2023, "PyTorch FSDP", section 3)."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from ..models import Transformer
from ._mesh import AbstractDeviceMesh
from ._rules import DATA

Module = TypeVar("Module")

_WHOLE = "whole weights"  # what a backward pass gathers again instead of keeping it


class GatheredAtUse(eqx.Module):
    """A module of a model, such as a transformer's block, that has its weights by pieces, and gathers them when it is
    called.

    The backward pass gathers them again. The gradients are by `offsets`: float32, summed over the shards, and divided
    as the weights are.

    **Arguments:**

    - `pieces`: the module, with this shard's part of each array.
    - `offsets`: zeros, shaped like the pieces that gradients are wanted of; `None` elsewhere. They are added to
        nothing: weights of a lower precision would have gradients of a lower precision, and so would the sums be.
    - `axes`: along which each array is divided, in the order of `jax.tree.leaves`; `None` for one that is whole.
    - `mesh`: over which.
    """

    pieces: PyTree
    offsets: PyTree
    axes: tuple[int | None, ...] = eqx.field(static=True)
    mesh: AbstractDeviceMesh

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        @_gathering_again
        def call(pieces: PyTree, offsets: PyTree, args: Any, kwargs: Any) -> Any:
            return _gathered(self.mesh, pieces, offsets, self.axes)(*args, **kwargs)

        return call(self.pieces, self.offsets, args, kwargs)


def at_use(mesh: AbstractDeviceMesh, model: Module, specs: PyTree, offsets: PyTree = None) -> Module:
    """Within `by_shard`: a model of weights of which this shard has a part.

    The blocks of a `Transformer` gather their weights when they are called, so that one block's are there at a time.
    All other weights are gathered at once.

    **Arguments:**

    - `model`: as it comes into the shard.
    - `specs`: a `PartitionSpec` of each array over the axis `data`, from `data_specs` of
        [`eqx_specgrpo.layout.AbstractDeviceMesh`][].
    - `offsets`: see [`eqx_specgrpo.layout.GatheredAtUse`][]; `None` where no gradient is wanted.
    """
    if mesh.data == 1:
        return model
    offsets = _no_offsets(model) if offsets is None else offsets
    if not isinstance(model, Transformer):
        return _gathered(mesh, model, offsets, _axes(specs))
    divided = zip(model.blocks, offsets.blocks, specs.blocks, strict=True)
    blocks = tuple(GatheredAtUse(block, of_block, _axes(spec), mesh) for block, of_block, spec in divided)
    others, their_offsets, their_specs = (_all_but_blocks(tree) for tree in (model, offsets, specs))
    return eqx.tree_at(
        lambda m: (m.blocks, *_all_but_blocks(m)),
        model,
        (blocks, *_gathered(mesh, others, their_offsets, _axes(their_specs))),
        is_leaf=lambda leaf: leaf is None,
    )


def gathered(mesh: AbstractDeviceMesh, tree: Module, specs: PyTree) -> Module:
    """Within `by_shard`: all of a tree of which this shard has a part.

    **Arguments:** as for [`eqx_specgrpo.layout.at_use`][].
    """
    return tree if mesh.data == 1 else _gathered(mesh, tree, _no_offsets(tree), _axes(specs))


def own_parts_of_total(mesh: AbstractDeviceMesh, tree: PyTree, specs: PyTree) -> PyTree:
    """Within `by_shard`: the sums over all shards, of which this one keeps its part.

    **Arguments:**

    - `tree`: whole arrays.
    - `specs`: as for [`eqx_specgrpo.layout.at_use`][]; of the same structure.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts = [_own_part(mesh, x, axis) for x, axis in zip(leaves, _axes(specs), strict=True)]
    return jax.tree.unflatten(structure, parts)


def value_and_gradients(
    mesh: AbstractDeviceMesh,
    function: Callable[[Module], tuple[Array, Any]],
    model: Module,
    specs: PyTree,
    is_trained: PyTree,
) -> tuple[tuple[Array, Any], PyTree]:
    """Within `by_shard`: what a function gives for a model of weights of which this shard has a part, and its gradients
    in float32, summed over the shards and divided as the weights are.

    **Arguments:**

    - `function`: from a model to a value, this shard's share of a sum, and anything else.
    - `model`, `specs`: as for [`eqx_specgrpo.layout.at_use`][].
    - `is_trained`: a tree like `model`, of booleans: which arrays gradients are wanted of.
    """
    trained, others = eqx.partition(model, is_trained)
    if mesh.data == 1:
        found, gradients = eqx.filter_value_and_grad(lambda x: function(eqx.combine(x, others)), has_aux=True)(trained)
        return found, jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    return eqx.filter_value_and_grad(lambda x: function(at_use(mesh, model, specs, x)), has_aux=True)(zeros)


def _all_but_blocks(tree: Transformer) -> tuple[Any, ...]:
    return tree.embedding, tree.norm, tree.unembedding


def _no_offsets(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: None, eqx.filter(tree, eqx.is_array))


def _axes(specs: PyTree) -> tuple[int | None, ...]:
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return tuple(spec.index(DATA) if DATA in spec else None for spec in leaves)


def _gathered(mesh: AbstractDeviceMesh, tree: Any, offsets: PyTree, axes: tuple[int | None, ...]) -> Any:
    arrays, others = eqx.partition(tree, eqx.is_array)
    pieces, structure = jax.tree.flatten(arrays)
    zeros = structure.flatten_up_to(offsets)
    whole = [_whole(mesh, axis, *both) for axis, *both in zip(axes, pieces, zeros, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, whole), others)


def _whole(mesh: AbstractDeviceMesh, axis: int | None, piece: Array, offset: Array | None) -> Array:
    def gather(piece: Array) -> Array:
        return checkpoint_name(piece if axis is None else mesh.of_all(piece, axis), _WHOLE)

    if offset is None:
        return gather(piece)

    @jax.custom_vjp
    def with_offset(piece: Array, offset: Array) -> Array:
        del offset
        return gather(piece)

    def forward(piece: Array, offset: Array) -> tuple[Array, None]:
        return with_offset(piece, offset), None

    def backward(_: None, cotangent: Array) -> tuple[None, Array]:
        return None, _own_part(mesh, cotangent.astype(jnp.float32), axis)

    with_offset.defvjp(forward, backward)
    return with_offset(piece, offset)


def _own_part(mesh: AbstractDeviceMesh, x: Array, axis: int | None) -> Array:
    return mesh.total(x) if axis is None else mesh.own_part_of_total(x, axis)


def _gathering_again(function: Callable) -> Callable:
    return eqx.filter_checkpoint(function, policy=jax.checkpoint_policies.save_anything_except_these_names(_WHOLE))
