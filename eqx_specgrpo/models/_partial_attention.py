"""Attention a piece of the keys at a time. What is not filled of a cache is then not read, and scores need little room.

A cache is made for the longest that a row may become, and most of the time it holds far less.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._attention import causal_mask, soft_capped

_SHORT_CACHE = 192


class PartialAttention(eqx.Module):
    """What attention has mixed of the keys seen so far, not yet divided by the sum of its weights.

    Exact, whatever the pieces: weights are relative to the greatest score so far, and what came before is scaled down
    when a greater one comes.

    ??? cite

        Milakov and Gimelshein, "Online normalizer calculation for softmax",
        [arXiv:1805.02867](https://arxiv.org/abs/1805.02867), section 3; for attention, Rabe and Staats,
        "Self-attention does not need O(n²) memory", [arXiv:2112.05682](https://arxiv.org/abs/2112.05682), section 2.

    **Arguments:**

    - `greatest`: score of each query.
    - `weight`: the sum of its weights.
    - `mixed`: values by these weights.
    """

    greatest: Float[Array, "batch kv_heads folded"]
    weight: Float[Array, "batch kv_heads folded"]
    mixed: Float[Array, "batch kv_heads folded head_dim"]

    @staticmethod
    def of_nothing(folded_queries: Float[Array, "batch kv_heads folded head_dim"]) -> "PartialAttention":
        """Before any key was seen."""
        # Like the queries, so that within `jax.shard_map` they vary over the same axes of its mesh.
        mixed = jnp.zeros_like(folded_queries, dtype=jnp.float32)
        # Finite, so that a piece of which a query sees nothing makes no infinity minus infinity.
        greatest = jnp.full_like(mixed[..., 0], jnp.finfo(jnp.float32).min)
        return PartialAttention(greatest, mixed[..., 0], mixed)

    def add(
        self,
        scores: Float[Array, "batch kv_heads folded slots"],
        mask: Bool[Array, "batch_or_1 seq slots"],
        mix: Callable[
            [Float[Array, "batch kv_heads folded slots"]],
            Float[Array, "batch kv_heads folded head_dim"],
        ],
    ) -> "PartialAttention":
        """With further keys.

        **Arguments:**

        - `scores`: of them, in float32.
        - `mask`: whether a position sees them.
        - `mix`: their values by given weights.
        """
        batch, kv_heads, folded, slots = scores.shape
        seq = mask.shape[1]
        grouped = scores.reshape(batch, kv_heads, folded // seq, seq, slots)
        scores = jnp.where(mask[:, None, None], grouped, -jnp.inf).reshape(scores.shape)
        greatest = jnp.maximum(self.greatest, scores.max(axis=-1))
        scale = jnp.exp(self.greatest - greatest)
        weights = jnp.exp(scores - greatest[..., None])
        return PartialAttention(
            greatest, scale * self.weight + weights.sum(axis=-1), scale[..., None] * self.mixed + mix(weights)
        )

    def result(self) -> Float[Array, "batch kv_heads folded head_dim"]:
        """What attention to all of them gives. Each query must have seen a key."""
        return self.mixed / self.weight[..., None]


def attend_to_filled(
    before: PartialAttention,
    folded_queries: Float[Array, "batch kv_heads folded head_dim"],
    transposed_keys: Float[Array, "batch kv_heads head_dim slots"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    positions: Int[Array, "batch seq"],
    sliding_window: int | None,
    softcap: float | None = None,
) -> PartialAttention:
    """Adds the slots of a cache in which slot and position are the same, up to the last position that is asked for.

    On CPU that many pieces are read. Elsewhere all slots are: a loop that ends by what was computed would stop the
    device once a layer. Reverse-mode differentiation has no way through that loop, on no device, since JAX looks at
    both forms before it chooses one; training needs no cache.

    **Arguments:**

    - `before`: what was seen already.
    - `positions`: of the queries.
    - `sliding_window`: how many positions a query sees, its own included; `None` for all.
    - `softcap`: what scores are capped at, smoothly; `None` for no cap.
    """

    def add(start, keys, part, is_new, sums):
        place = (start + jnp.arange(part.shape[2], dtype=positions.dtype))[None]
        mask = causal_mask(positions, place, sliding_window) & is_new(place)[:, None]

        def mix(weights):
            return jnp.einsum("bkqs,bksd->bkqd", weights.astype(part.dtype), part, preferred_element_type=jnp.float32)

        scores = jnp.einsum("bkqd,bkds->bkqs", folded_queries, keys, preferred_element_type=jnp.float32)
        return sums.add(soft_capped(scores, softcap), mask, mix)

    first = 0 if sliding_window is None else jnp.maximum(jnp.min(positions) - sliding_window + 1, 0)
    filled = first, jnp.max(positions) + 1
    return over_filled(add, before, transposed_keys, values, filled, positions.shape[1])


def over_filled(
    add: Callable[[Any, Array, Array, Callable[[Array], Array], PartialAttention], PartialAttention],
    before: PartialAttention,
    transposed_keys: Float[Array, "stored kv_heads head_dim slots"],
    values: Float[Array, "stored kv_heads slots head_dim"],
    filled: tuple[Any, Int[Array, ""]],
    seq: int,
) -> PartialAttention:
    """Adds a cache piece by piece: on CPU those that are filled, elsewhere all slots at once; see `attend_to_filled`.

    **Arguments:**

    - `add`: adds a piece to the sums. Its arguments are the first slot of the piece, its keys and its values, which
        slots were not in an earlier piece, and the sums.
    - `filled`: the first slot that is asked for, and the one after the last.
    - `seq`: positions of the block of queries.
    """
    in_pieces = partial(_over_pieces, add)
    slots = values.shape[2]
    piece = _piece_length(seq, slots)
    if piece >= slots:
        return in_pieces(before, transposed_keys, values, *filled, piece=slots)
    return lax.platform_dependent(
        before,
        transposed_keys,
        values,
        *filled,
        cpu=partial(in_pieces, piece=piece),
        default=partial(in_pieces, piece=slots),
    )


def _piece_length(seq: int, slots: int) -> int:
    """All of a short cache; of a longer one 128 slots, or as many as the block has, up to 512.

    A piece is copied before it is read, and reading all of a short cache takes less than that. A longer piece does less
    often what is done once a piece, about 2 ms a round of SmolLM2 with 16 rows; a shorter one leaves less unfilled
    slots in the last, and needs less memory (docs/experiments.md, 2026-11-24 and 2026-11-27).
    """
    return slots if slots <= _SHORT_CACHE else max(128, min(seq, 512))


def _over_pieces(add, before, transposed_keys, values, first, end, *, piece):
    slots = values.shape[2]

    def one(index, sums):
        # The last piece begins earlier where it would not fit, and what was counted already is masked.
        start = jnp.minimum(index * piece, slots - piece)
        keys = lax.dynamic_slice_in_dim(transposed_keys, start, piece, axis=3)
        part = lax.dynamic_slice_in_dim(values, start, piece, axis=2)
        return add(start, keys, part, lambda place: place >= index * piece, sums)

    if piece == slots:
        return add(0, transposed_keys, values, lambda place: place >= 0, before)
    return lax.fori_loop(first // piece, (end - 1) // piece + 1, one, before)
