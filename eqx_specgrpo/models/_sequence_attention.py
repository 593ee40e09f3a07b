"""Attention of whole sequences, as training and scoring need it: which way to compute it, by size, dtype and device."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._attention import attention, causal_mask
from ._blockwise_attention import blockwise_attention
from ._segments import Extent, Segment

# Up to here all scores of a row and head fit in one block, and there is nothing to leave out.
_FEW_SLOTS = 128


def attend_to_segments(
    queries: Float[Array, "batch seq heads head_dim"],
    extent: Extent,
    segments: tuple[Segment, ...],
    sliding_window: int | None,
    softcap: float | None = None,
) -> Float[Array, "batch seq heads*head_dim"]:
    """Causal grouped-query attention to several segments as if they were one, softmax in float32.

    Short sequences go the dense way and all others by blocks; on CUDA, operands of 16 bits through cuDNN's kernel where
    it takes their head size. Operands have the dtype of the keys, and what is returned is float32.

    **Arguments:**

    - `queries`: turned to their positions.
    - `extent`: where they lie. What is returned for padding is finite, and of no use.
    - `segments`: the first begin where the one before ends; the last are the queries' own keys and values.
    - `sliding_window`: how many positions a query sees, its own included; `None` for all.
    - `softcap`: of the scores, see `soft_capped`; with one, attention goes the dense way at any length.
    """
    if softcap is not None or sum(segment.keys.shape[2] for segment in segments) <= _FEW_SLOTS:
        return dense_attention(queries, extent, segments, sliding_window, softcap)
    # Its tracing asks which cuDNN there is, so that elsewhere it may not even be offered.
    if jax.default_backend() == "gpu" and _cudnn_takes(segments[0].keys):

        def blockwise(queries, extent, segments):
            return blockwise_attention(queries, extent, segments, sliding_window)[0]

        def cudnn(queries, extent, segments):
            return cudnn_attention(queries, extent, segments, sliding_window)

        return lax.platform_dependent(queries, extent, segments, cuda=cudnn, default=blockwise)
    return blockwise_attention(queries, extent, segments, sliding_window)[0]


def attend_with_normalizers(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch kv_heads seq head_dim"],
    values: Float[Array, "batch kv_heads seq head_dim"],
) -> tuple[Float[Array, "batch seq heads*head_dim"], Float[Array, "batch seq heads"]]:
    """Causal attention of whole sequences, to be joined to attention to other keys.

    **Returns:**

    What it mixed, and for each query and head the logarithm of the sum of the exponentials of its scores.
    """
    batch, seq, _, _ = queries.shape
    extent = Extent(jnp.zeros(batch, jnp.int32), jnp.full(batch, seq, jnp.int32))
    return blockwise_attention(queries, extent, (Segment(keys, values, None, extent),), None)


def dense_attention(
    queries: Float[Array, "batch seq heads head_dim"],
    extent: Extent,
    segments: tuple[Segment, ...],
    sliding_window: int | None,
    softcap: float | None = None,
) -> Float[Array, "batch seq heads*head_dim"]:
    """`attend_to_segments` with all scores at once."""
    copies = [segment.of_each_row() for segment in segments]
    keys, values = (jnp.concatenate(x, axis=2) for x in zip(*copies, strict=True))
    # Padding sees its own place, so that no query sees nothing at all.
    positions = extent.start[:, None] + jnp.arange(queries.shape[1], dtype=extent.start.dtype)[None]
    before = [segment.extent.positions(segment.keys.shape[2]) for segment in segments[:-1]]
    slots = jnp.concatenate([*before, positions], axis=1)
    return attention(queries, keys, values, causal_mask(positions, slots, sliding_window), softcap)


def cudnn_attention(
    queries: Float[Array, "batch seq heads head_dim"],
    extent: Extent,
    segments: tuple[Segment, ...],
    sliding_window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch seq heads*head_dim"]:
    """`attend_to_segments` through cuDNN's fused kernel, forward and backward.

    It knows causality by index alone. So the segments become one sequence without a gap, and the queries stand behind
    as many that nobody asks for as there are positions before them.

    **Arguments:**

    - `implementation`: `"xla"` computes the same anywhere, with all scores at once.
    """
    first = segments[0].extent.start
    width = sum(segment.keys.shape[2] for segment in segments)
    place = jnp.arange(width, dtype=first.dtype)[None]
    copies = [segment.of_each_row() for segment in segments]
    offset, index = 0, jnp.full((queries.shape[0], width), width)
    for segment in segments:
        within = first[:, None] + place - segment.extent.start[:, None]
        index = jnp.where((within >= 0) & (within < segment.extent.length[:, None]), offset + within, index)
        offset += segment.keys.shape[2]

    def one(parts: tuple[Array, ...]) -> Array:
        whole = jnp.concatenate(parts, axis=2).transpose(0, 2, 1, 3)
        return jnp.take_along_axis(whole, index[:, :, None, None], axis=1, mode="fill", fill_value=0)

    keys, values = (one(parts) for parts in zip(*copies, strict=True))
    before, seq = (extent.start - first)[:, None], queries.shape[1]
    own = place - before
    own = jnp.where((own >= 0) & (own < seq), own, seq)
    asked = jnp.take_along_axis(queries.astype(keys.dtype), own[:, :, None, None], axis=1, mode="fill", fill_value=0)
    lengths = (extent.start + extent.length - first).astype(jnp.int32)
    mixed = jax.nn.dot_product_attention(
        asked,
        keys,
        values,
        scale=1 / math.sqrt(queries.shape[-1]),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation=implementation,
    )
    back = jnp.minimum(before + jnp.arange(seq, dtype=first.dtype)[None], width - 1)
    mixed = jnp.take_along_axis(mixed, back[:, :, None, None], axis=1).astype(jnp.float32)
    return mixed.reshape(*mixed.shape[:2], -1)


def _cudnn_takes(keys: Float[Array, "stored kv_heads slots head_dim"]) -> bool:
    head_dim = keys.shape[-1]
    return keys.dtype in (jnp.bfloat16, jnp.float16) and head_dim <= 128 and head_dim % 8 == 0
