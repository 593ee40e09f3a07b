"""Attention of whole sequences in memory linear in their length: scores exist a block at a time, in both directions.

The forward keeps its output and, for each query, the logarithm of its sum of weights; the backward computes the scores
again. A block is computed only if one of its queries sees one of its keys: none after the queries, none beyond a row's
end, none before a sliding window. Rows that begin with a common prompt read its keys where they lie.

??? cite

    Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning",
    [arXiv:2307.08691](https://arxiv.org/abs/2307.08691), section 3.1; Rabe and Staats, "Self-attention does not need
    O(n²) memory", [arXiv:2112.05682](https://arxiv.org/abs/2112.05682).
"""

import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._attention import masked_scores
from ._segments import Extent, Segment


class Blocks(NamedTuple):
    """How much is computed at a time.

    **Arguments:**

    - `rows`: rows of queries: all of them, or a number that divides them.
    - `queries`, `keys`: positions.
    """

    rows: int
    queries: int
    keys: int


def blocks_on_cpu(seq: int) -> Blocks:
    """A row at a time, and blocks whose scores stay in the cores' caches.

    Milliseconds of a forward and backward, 2,048 positions, 9 heads of 64 and 3 of keys, float32, two cores of an AMD
    EPYC: dense 68, 143, 307, 505 and 1193 with rows of 128, 256, 512, 1,024 and 2,048 positions; blocks of 64 x 64
    46 and 38 for the first two, of 128 x 128 46, 219, 267 and 244 from the second on, of 256 x 256 230 and 348 for the
    last two (medians; the least of each is 28 to 68% of the dense form's). With 4,096 positions 256 x 256 was fastest.
    """
    size = 64 if seq <= 256 else 128 if seq <= 1024 else 256
    return Blocks(1, size, size)


def blocks_elsewhere(batch: int) -> Blocks:
    """All rows at a time: a device with many units wants few, large products."""
    return Blocks(batch, 512, 512)


def blockwise_attention(
    queries: Float[Array, "batch seq heads head_dim"],
    extent: Extent,
    segments: tuple[Segment, ...],
    sliding_window: int | None,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "batch seq heads*head_dim"], Float[Array, "batch seq heads"]]:
    """Grouped-query attention, softmax in float32, to several segments of keys as if they were one.

    Operands have the dtype of the keys; products, and what is returned, are float32.

    **Arguments:**

    - `queries`: turned to their positions.
    - `extent`: where they lie. What is returned for padding is finite, and of no use.
    - `segments`: what they attend to, causally, by position.
    - `sliding_window`: how many positions a query sees, its own included; `None` for all.
    - `blocks`: how much is computed at a time; by default what is fast on the platform that it is compiled for.

    **Returns:**

    What attention mixed, and for each query and head the logarithm of the sum of the exponentials of its scores, with
    which it can be joined to attention to other keys. Both can be differentiated.
    """
    scaled = (queries / math.sqrt(queries.shape[-1])).astype(segments[0].keys.dtype)
    keys_and_values = tuple((segment.keys, segment.values) for segment in segments)
    places = _Places(extent, tuple((segment.row, segment.extent) for segment in segments))
    return _attend(_Settings(sliding_window, blocks), scaled, keys_and_values, places)


# Of segments, each with as many stored rows and slots as it has.
KeysAndValues = tuple[Float[Array, "_ kv_heads _ head_dim"], Float[Array, "_ kv_heads _ head_dim"]]


class _Settings(NamedTuple):
    sliding_window: int | None
    blocks: Blocks | None


class _Places(eqx.Module):
    """Where the queries are, and for each segment which stored row is read and where it is."""

    queries: Extent
    segments: tuple[tuple[Int[Array, " batch"] | None, Extent], ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _Settings, queries: Array, keys_and_values: tuple[KeysAndValues, ...], places: _Places
) -> tuple[Array, Array]:
    return _attend_fwd(settings, queries, keys_and_values, places)[0]


def _attend_fwd(settings, queries, keys_and_values, places):
    out, normalizers = _on_platform(_forward, settings, queries, keys_and_values, places)
    return (out, normalizers), (queries, keys_and_values, places, out, normalizers)


def _attend_bwd(settings, residuals, cotangents):
    queries, keys_and_values, places, out, normalizers = residuals
    cotangent, of_normalizers = cotangents
    batch, seq, heads, _ = queries.shape
    # A score's gradient is its weight times what its value adds, less the mean of that, plus the normalizer's.
    inner = jnp.sum((cotangent * out).reshape(batch, seq, heads, -1), axis=-1) - of_normalizers
    d_queries, d_keys_and_values = _on_platform(
        _backward, settings, queries, keys_and_values, places, normalizers, inner, cotangent.astype(queries.dtype)
    )
    like = lambda gradients, x: gradients.astype(x.dtype)
    return like(d_queries, queries), jax.tree.map(like, d_keys_and_values, keys_and_values), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _on_platform(function, settings: _Settings, queries: Array, *arguments):
    batch, seq, _, _ = queries.shape
    if settings.blocks is not None:
        return function(settings.sliding_window, settings.blocks, queries, *arguments)
    return lax.platform_dependent(
        queries,
        *arguments,
        cpu=partial(function, settings.sliding_window, blocks_on_cpu(seq)),
        default=partial(function, settings.sliding_window, blocks_elsewhere(batch)),
    )


class _Layout(NamedTuple):
    """Queries as the loops read them: block by block, those that share a key/value head in one axis."""

    kv_heads: int
    group: int
    seq: int
    size: int

    @staticmethod
    def of(queries: Float[Array, "batch seq heads head_dim"], kv_heads: int, blocks: Blocks) -> "_Layout":
        _, seq, heads, _ = queries.shape
        return _Layout(kv_heads, heads // kv_heads, seq, min(blocks.queries, seq))

    @property
    def num(self) -> int:
        return -(-self.seq // self.size)

    def split(self, x: Float[Array, "batch seq mixed"]) -> Float[Array, "batch blocks kv_heads folded width"]:
        """A last axis of all heads, or of one number a head, becomes blocks of positions and of heads."""
        batch = x.shape[0]
        x = jnp.pad(x, ((0, 0), (0, self.num * self.size - self.seq), (0, 0)))
        x = x.reshape(batch, self.num, self.size, self.kv_heads, self.group, -1).transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(batch, self.num, self.kv_heads, self.group * self.size, -1)

    def join(self, x: Float[Array, "batch blocks kv_heads folded width"]) -> Float[Array, "batch seq mixed"]:
        """The inverse of `split`."""
        batch = x.shape[0]
        x = x.reshape(batch, self.num, self.kv_heads, self.group, self.size, -1).transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(batch, self.num * self.size, -1)[:, : self.seq]


class _Blocked(eqx.Module):
    """A segment padded to whole blocks: what the loops read."""

    keys: Float[Array, "stored kv_heads slots head_dim"]
    values: Float[Array, "stored kv_heads slots head_dim"]
    row: Int[Array, " batch"] | None
    extent: Extent
    size: int = eqx.field(static=True)

    @staticmethod
    def all(keys_and_values: tuple[KeysAndValues, ...], places: _Places, blocks: Blocks) -> "list[_Blocked]":
        found = []
        for (keys, values), (row, extent) in zip(keys_and_values, places.segments, strict=True):
            size = min(blocks.keys, keys.shape[2])
            padding = ((0, 0), (0, 0), (0, -keys.shape[2] % size), (0, 0))
            found.append(_Blocked(jnp.pad(keys, padding), jnp.pad(values, padding), row, extent, size))
        return found

    def take(self, x: Array, rows: Int[Array, " rows"], index: Int[Array, ""]) -> Array:
        """A block of an array shaped like the keys, for some rows of queries."""
        if rows.shape[0] == 1:
            return lax.dynamic_slice(x, self._corner(rows, index), (1, x.shape[1], self.size, x.shape[3]))
        block = lax.dynamic_slice_in_dim(x, index * self.size, self.size, 2)
        return block if self.row is None else block[self.row]

    def add(self, x: Array, rows: Int[Array, " rows"], index: Int[Array, ""], part: Array) -> Array:
        """Adds to what `take` gives."""
        if rows.shape[0] == 1:
            return lax.dynamic_update_slice(x, self.take(x, rows, index) + part, self._corner(rows, index))
        before = lax.dynamic_slice_in_dim(x, index * self.size, self.size, 2)
        after = before + part if self.row is None else before.at[self.row].add(part)
        return lax.dynamic_update_slice_in_dim(x, after, index * self.size, 2)

    def _corner(self, rows, index):
        row = rows[0] if self.row is None else self.row[rows[0]]
        return (row, 0, index * self.size, 0)


class _Tile(eqx.Module):
    """The queries of one block, in some of the rows.

    **Arguments:**

    - `rows`: which.
    - `first`: position of the first query of each.
    - `end`: the position after the last that is not padding; 0 if all are.
    """

    rows: Int[Array, " rows"]
    first: Int[Array, " rows"]
    end: Int[Array, " rows"]
    size: int = eqx.field(static=True)

    @staticmethod
    def of(extent: Extent, rows: Int[Array, " rows"], index: Int[Array, ""], size: int) -> "_Tile":
        start, length = extent.start[rows], extent.length[rows]
        end = jnp.where(index * size < length, start + jnp.minimum((index + 1) * size, length), 0)
        return _Tile(rows, start + index * size, end, size)

    def bounds(self, segment: _Blocked, sliding_window: int | None) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The first block of a segment of which a query sees something, and the one after the last."""
        start, length = segment.extent.start[self.rows], segment.extent.length[self.rows]
        end = jnp.maximum(jnp.minimum(self.end - start, length), 0)
        after = jnp.max((end + segment.size - 1) // segment.size)
        if sliding_window is None:
            return jnp.zeros_like(after), after
        first = jnp.maximum(self.first - sliding_window + 1 - start, 0)
        return jnp.min(jnp.where(first < end, first // segment.size, after)), after

    def scores(
        self, queries: Array, keys: Array, segment: _Blocked, index: Int[Array, ""], sliding_window: int | None
    ) -> Float[Array, "rows kv_heads folded keys"]:
        """Minus infinity where nothing is seen."""
        slot = index * segment.size + jnp.arange(segment.size)
        distance = (self.first - segment.extent.start[self.rows])[:, None, None]
        distance = distance + jnp.arange(self.size)[None, :, None] - slot[None, None]
        mask: Bool[Array, "rows queries keys"] = distance >= 0
        mask = mask & (slot[None] < segment.extent.length[self.rows][:, None])[:, None]
        if sliding_window is not None:
            mask = mask & (distance < sliding_window)
        return masked_scores(_product("bkqd,bksd->bkqs", queries, keys), mask)


def _product(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _all_heads(x: Float[Array, "batch seq heads head_dim"]) -> Float[Array, "batch seq heads*head_dim"]:
    return x.reshape(*x.shape[:2], -1)


def _for_each_tile(extent: Extent, layout: _Layout, num_rows: int, compute, carry):
    """`compute(tile, place, carry)` for every block of queries."""

    def one(index, carry):
        first, block = index // layout.num * num_rows, index % layout.num
        rows = first + jnp.arange(num_rows)
        return compute(_Tile.of(extent, rows, block, layout.size), (first, block), carry)

    return lax.fori_loop(0, extent.start.shape[0] // num_rows * layout.num, one, carry)


def _read(x: Array, place, num_rows: int) -> Array:
    """A tile's part of queries, or of what belongs to them."""
    return lax.dynamic_slice(x, (*place, 0, 0, 0), (num_rows, 1, *x.shape[2:]))[:, 0]


def _write(x: Array, part: Array, place) -> Array:
    return lax.dynamic_update_slice(x, part[:, None], (*place, 0, 0, 0))


def _forward(sliding_window, blocks, queries, keys_and_values, places):
    """The output, and for each query and head the logarithm of the sum of the exponentials of its scores."""
    layout = _Layout.of(queries, keys_and_values[0][0].shape[1], blocks)
    segments = _Blocked.all(keys_and_values, places, blocks)
    split = layout.split(_all_heads(queries))

    def compute(tile, place, carry):
        out, normalizers = carry
        own = _read(split, place, blocks.rows)

        def add(segment, index, sums):
            greatest, weight, mixed = sums
            keys, values = (segment.take(x, tile.rows, index) for x in (segment.keys, segment.values))
            scores = tile.scores(own, keys, segment, index, sliding_window)
            new = jnp.maximum(greatest, scores.max(axis=-1, keepdims=True))
            scale, weights = jnp.exp(greatest - new), jnp.exp(scores - new)
            mixed = scale * mixed + _product("bkqs,bksd->bkqd", weights.astype(values.dtype), values)
            return new, scale * weight + weights.sum(axis=-1, keepdims=True), mixed

        mixed = jnp.zeros_like(own, jnp.float32)
        # Finite, so that a block of which a query sees nothing makes no infinity minus infinity.
        sums = jnp.full_like(mixed[..., :1], jnp.finfo(jnp.float32).min), mixed[..., :1], mixed
        for segment in segments:
            start, stop = tile.bounds(segment, sliding_window)
            sums = lax.fori_loop(start, stop, partial(add, segment), sums)
        greatest, weight, mixed = sums
        weight = jnp.where(weight > 0, weight, 1.0)  # of padding, which may see nothing
        return _write(out, mixed / weight, place), _write(normalizers, greatest + jnp.log(weight), place)

    out = jnp.zeros_like(split, jnp.float32)
    carry = _for_each_tile(places.queries, layout, blocks.rows, compute, (out, out[..., :1]))
    return tuple(layout.join(x) for x in carry)


def _backward(sliding_window, blocks, queries, keys_and_values, places, normalizers, inner, cotangent):
    """Gradients of queries, and of each segment's keys and values, in float32."""
    layout = _Layout.of(queries, keys_and_values[0][0].shape[1], blocks)
    segments = _Blocked.all(keys_and_values, places, blocks)
    ours = [layout.split(x) for x in (_all_heads(queries), cotangent, normalizers, inner)]

    def compute(tile, place, carry):
        d_queries, d_segments = carry
        own, d_out, normalizer, subtracted = (_read(x, place, blocks.rows) for x in ours)

        def add(segment, index, carry):
            d_own, d_keys, d_values = carry
            keys, values = (segment.take(x, tile.rows, index) for x in (segment.keys, segment.values))
            weights = jnp.exp(tile.scores(own, keys, segment, index, sliding_window) - normalizer)
            d_weights = _product("bkqd,bksd->bkqs", d_out, values)
            d_scores = (weights * (d_weights - subtracted)).astype(keys.dtype)
            weights = weights.astype(values.dtype)
            d_values = segment.add(d_values, tile.rows, index, _product("bkqs,bkqd->bksd", weights, d_out))
            d_keys = segment.add(d_keys, tile.rows, index, _product("bkqs,bkqd->bksd", d_scores, own))
            return d_own + _product("bkqs,bksd->bkqd", d_scores, keys), d_keys, d_values

        d_own, new = jnp.zeros_like(own, jnp.float32), []
        for segment, (d_keys, d_values) in zip(segments, d_segments, strict=True):
            start, stop = tile.bounds(segment, sliding_window)
            d_own, *gradients = lax.fori_loop(start, stop, partial(add, segment), (d_own, d_keys, d_values))
            new.append(tuple(gradients))
        return _write(d_queries, d_own, place), tuple(new)

    zeros = tuple(tuple(jnp.zeros_like(x, jnp.float32) for x in (s.keys, s.values)) for s in segments)
    carry = jnp.zeros_like(ours[0], jnp.float32), zeros
    d_queries, d_segments = _for_each_tile(places.queries, layout, blocks.rows, compute, carry)
    d_queries = layout.join(d_queries).reshape(queries.shape)
    slots = [keys.shape[2] for keys, _ in keys_and_values]
    return d_queries, tuple(
        tuple(x[:, :, :size] for x in gradients) for gradients, size in zip(d_segments, slots, strict=True)
    )
