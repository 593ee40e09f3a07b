"""Key/value caches. A layer hands over the keys and values of a block and gets back what to attend to.

The cache has one cursor a row, and the decoder owns it: a block is written at the positions that the caller gives, and
attention sees the slots whose position is not after the query's. Rewinding is therefore nothing but a smaller position
at the next write; rejected entries are masked by position until they are overwritten.

Keys and values are separate arrays: no slice or concatenation stands between the write and the read. The batch axes
lead, and each array has the axis over which attention sums before the other one: both products then take their second
operand as it lies.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int


class AbstractLayerCache(eqx.Module):
    """What one attention layer reads and writes."""

    @abstractmethod
    def update(
        self,
        keys: Float[Array, "batch kv_heads block head_dim"],
        values: Float[Array, "batch kv_heads block head_dim"],
        positions: Int[Array, "batch block"],
    ) -> tuple[
        Float[Array, "batch kv_heads slots head_dim"],
        Float[Array, "batch kv_heads slots head_dim"],
        Int[Array, "batch_or_1 slots"],
        "AbstractLayerCache",
    ]:
        """Takes the block in.

        **Arguments:**

        - `keys`, `values`: of the block.
        - `positions`: absolute positions; consecutive within a row.

        **Returns:**

        The keys and values to attend to, the absolute position of each slot, and the updated cache.
        """


class NoCache(AbstractLayerCache):
    """The null cache: a block attends to itself only. What training and a single forward use."""

    def update(self, keys, values, positions):
        return keys, values, positions, self


class KVCache(AbstractLayerCache):
    """Linear cache with slot = absolute position.

    Writes beyond the last slot would be clamped silently by XLA and overwrite valid entries, so whoever sizes the cache
    must leave room for the longest row plus one block; `decode` checks this before its loop.
    """

    transposed_keys: Float[Array, "batch kv_heads head_dim slots"]
    values: Float[Array, "batch kv_heads slots head_dim"]

    @staticmethod
    def empty(batch: int, kv_heads: int, slots: int, head_dim: int, dtype: DTypeLike) -> "KVCache":
        keys = jnp.zeros((batch, kv_heads, head_dim, slots), dtype)
        return KVCache(keys, jnp.zeros((batch, kv_heads, slots, head_dim), dtype))

    @property
    def keys(self) -> Float[Array, "batch kv_heads slots head_dim"]:
        return self.transposed_keys.swapaxes(2, 3)

    def update(self, keys, values, positions):
        start = positions[:, 0]
        new = KVCache(
            _write_rows(self.transposed_keys, keys.swapaxes(2, 3), start, axis=2),
            _write_rows(self.values, values, start, axis=1),
        )
        slot_positions = jnp.arange(new.values.shape[2], dtype=positions.dtype)[None]
        return new.keys, new.values, slot_positions, new


def _write_rows(
    cache: Float[Array, "batch kv_heads _ _"],
    block: Float[Array, "batch kv_heads _ _"],
    start: Int[Array, " batch"],
    *,
    axis: int,
) -> Float[Array, "batch kv_heads _ _"]:
    """Each row's block at its own slot. `axis` is that of the slots within a row."""

    def write(row, new, slot):
        return lax.dynamic_update_slice_in_dim(row, new, slot, axis)

    return jax.vmap(write)(cache, block.astype(cache.dtype), start)


Cache = tuple[AbstractLayerCache, ...]


def take_rows(cache: Cache, rows: Int[Array, " rows"]) -> Cache:
    """Selects, repeats or reorders the rows of a cache, for groups that share a prompt and for shrinking a batch."""
    return jax.tree.map(lambda x: x[rows], cache)
