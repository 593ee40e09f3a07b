"""Key/value caches. A layer hands over the keys and values of a block and gets back what to attend to.

The cache has one cursor a row, and the decoder owns it: a block is written at the positions that the caller gives, and
attention sees the slots whose position is not after the query's. Rewinding is therefore nothing but a smaller position
at the next write; rejected entries are masked by position until they are overwritten.

Keys and values are separate arrays: no slice or concatenation stands between the write and the read. The batch axes
lead, and each array has the axis over which attention sums before the other one: both products then take their second
operand as it lies.
"""

from abc import abstractmethod
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from ._attention import causal_mask, fold_queries, masked_scores, soft_capped, unfold_heads
from ._partial_attention import PartialAttention, attend_to_filled


class AbstractLayerCache(eqx.Module):
    """What one attention layer reads and writes."""

    @abstractmethod
    def attend(
        self,
        queries: Float[Array, "batch block heads head_dim"],
        keys: Float[Array, "batch kv_heads block head_dim"],
        values: Float[Array, "batch kv_heads block head_dim"],
        positions: Int[Array, "batch block"],
        sliding_window: int | None,
        softcap: float | None = None,
    ) -> tuple[Float[Array, "batch block heads*head_dim"], "AbstractLayerCache"]:
        """Takes the block in, and lets its queries attend to all that is there, causally.

        **Arguments:**

        - `queries`, `keys`, `values`: of the block, turned to their positions.
        - `positions`: absolute positions; consecutive within a row.
        - `sliding_window`: how many positions a query sees, its own included; `None` for all.
        - `softcap`: what scores are capped at, smoothly; `None` for no cap.

        **Returns:**

        What attention mixed, all heads of a position in one vector, and the updated cache.
        """


class KVCache(AbstractLayerCache):
    """Linear cache with slot = absolute position. What a block pays for is what is filled, not what there is room for.

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

    def write(
        self,
        keys: Float[Array, "batch kv_heads block head_dim"],
        values: Float[Array, "batch kv_heads block head_dim"],
        positions: Int[Array, "batch block"],
    ) -> "KVCache":
        """With a block in it. Its positions are consecutive within a row."""
        start = positions[:, 0]
        return KVCache(
            _write_block(self.transposed_keys, keys.swapaxes(2, 3), start, axis=2),
            _write_block(self.values, values, start, axis=1),
        )

    def with_slots(self, slots: int) -> "KVCache":
        """With so many slots: more of them, empty, or without the last ones, in which nothing may be."""
        return KVCache(_first_slots(self.transposed_keys, slots, 3), _first_slots(self.values, slots, 2))

    def attend(self, queries, keys, values, positions, sliding_window, softcap=None):
        cache = self.write(keys, values, positions)
        folded = fold_queries(queries, keys.shape[1]).astype(cache.values.dtype)
        mixed = lax.platform_dependent(
            cache,
            folded,
            positions,
            cpu=partial(_attend_to_filled, sliding_window=sliding_window, softcap=softcap),
            default=partial(attend_to_all, sliding_window=sliding_window, softcap=softcap),
        )
        return unfold_heads(mixed, positions.shape[1]), cache

    def attend_on(
        self,
        before: PartialAttention,
        folded_queries: Float[Array, "batch kv_heads folded head_dim"],
        positions: Int[Array, "batch block"],
        sliding_window: int | None,
        softcap: float | None = None,
    ) -> PartialAttention:
        """Adds what is in the cache, the block included, to what queries have seen elsewhere."""
        keys, values = self.transposed_keys, self.values
        return attend_to_filled(before, folded_queries, keys, values, positions, sliding_window, softcap)


def _attend_to_filled(cache, folded_queries, positions, *, sliding_window, softcap):
    nothing = PartialAttention.of_nothing(folded_queries)
    return cache.attend_on(nothing, folded_queries, positions, sliding_window, softcap).result()


def attend_to_all(
    cache: KVCache,
    folded_queries: Float[Array, "batch kv_heads folded head_dim"],
    positions: Int[Array, "batch block"],
    *,
    sliding_window: int | None,
    softcap: float | None,
) -> Float[Array, "batch kv_heads folded head_dim"]:
    """Attention to all slots of a cache, by one plain softmax, which XLA makes one kernel of on a GPU.

    **Arguments:**

    - `positions`: of the queries.
    - `sliding_window`, `softcap`: see [`eqx_specgrpo.models.AbstractLayerCache`][].
    """
    keys, values = cache.transposed_keys, cache.values
    place = jnp.arange(values.shape[2], dtype=positions.dtype)[None]
    scores = jnp.einsum("bkqd,bkds->bkqs", folded_queries, keys, preferred_element_type=jnp.float32)
    scores = masked_scores(soft_capped(scores, softcap), causal_mask(positions, place, sliding_window))
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkqs,bksd->bkqd", weights, values, preferred_element_type=jnp.float32)


def write_rows(
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


def _write_block(
    cache: Float[Array, "batch kv_heads _ _"],
    block: Float[Array, "batch kv_heads _ _"],
    start: Int[Array, " batch"],
    *,
    axis: int,
) -> Float[Array, "batch kv_heads _ _"]:
    """`write_rows` on CPU, and `write_positions` elsewhere."""
    return lax.platform_dependent(
        cache, block, start, cpu=partial(write_rows, axis=axis), default=partial(write_positions, axis=axis)
    )


def write_positions(
    cache: Float[Array, "batch kv_heads _ _"],
    block: Float[Array, "batch kv_heads _ _"],
    start: Int[Array, " batch"],
    *,
    axis: int,
) -> Float[Array, "batch kv_heads _ _"]:
    """Does what `write_rows` does, as a scatter with one window for each position of the block.

    The heads of a position lie together in what a layer's product gives. On a GPU keys are then turned to their
    positions and written by one kernel. A block written whole takes three, because XLA transposes it by itself.
    """
    size = block.shape[axis + 1]
    # The indices name all three axes of a row. If they named the slots alone, XLA would transpose the cache first.
    numbers = lax.ScatterDimensionNumbers((1, 2, 3), (), (0, 1, 2))

    def write(row, new, slot):
        indices = jnp.zeros((size, 3), slot.dtype).at[:, axis].set(slot + jnp.arange(size, dtype=slot.dtype))
        updates = jnp.expand_dims(jnp.moveaxis(new, axis, 0), axis + 1)
        return lax.scatter(row, indices, updates, numbers, indices_are_sorted=True, unique_indices=True)

    return jax.vmap(write)(cache, block.astype(cache.dtype), start)


def _first_slots(
    array: Float[Array, "batch kv_heads _ _"], slots: int, axis: int
) -> Float[Array, "batch kv_heads _ _"]:
    more = slots - array.shape[axis]
    if more <= 0:
        return lax.slice_in_dim(array, 0, slots, axis=axis)
    return jnp.pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)])


Cache = tuple[AbstractLayerCache, ...]


def take_rows(cache: Cache, rows: Int[Array, " rows"]) -> Cache:
    """Selects, repeats or reorders the rows of a cache, for groups that share a prompt and for shrinking a batch."""
    return jax.tree.map(lambda x: x[rows], cache)
