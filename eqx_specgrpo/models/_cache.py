"""Key/value caches. A layer hands over the keys and values of a block and gets back what to attend to.

The cache has one cursor a row, and the decoder owns it: a block is written at the positions that the caller gives, and
attention sees the slots whose position is not after the query's. Rewinding is therefore nothing but a smaller position
at the next write; rejected entries are masked by position until they are overwritten.

Keys and values are separate arrays, `[batch, kv_heads, slots, head_dim]`: the batch axes lead in both attention
products, and no slice or concatenation stands between the write and the read.
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

    keys: Float[Array, "batch kv_heads slots head_dim"]
    values: Float[Array, "batch kv_heads slots head_dim"]

    @staticmethod
    def empty(batch: int, kv_heads: int, slots: int, head_dim: int, dtype: DTypeLike) -> "KVCache":
        shape = (batch, kv_heads, slots, head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def update(self, keys, values, positions):
        start = positions[:, 0]
        new_keys = _write_rows(self.keys, keys, start)
        new_values = _write_rows(self.values, values, start)
        slot_positions = jnp.arange(new_keys.shape[2], dtype=positions.dtype)[None]
        return new_keys, new_values, slot_positions, KVCache(new_keys, new_values)


def _write_rows(cache: Array, block: Array, start: Array) -> Array:
    def write(row, new, slot):
        return lax.dynamic_update_slice(row, new, (0, slot, 0))

    return jax.vmap(write)(cache, block.astype(cache.dtype), start)


Cache = tuple[AbstractLayerCache, ...]


def take_rows(cache: Cache, rows: Int[Array, " rows"]) -> Cache:
    """Selects, repeats or reorders the rows of a cache, for groups that share a prompt and for shrinking a batch."""
    return jax.tree.map(lambda x: x[rows], cache)
