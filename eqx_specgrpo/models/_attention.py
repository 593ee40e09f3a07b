"""Scaled dot-product attention over keys and values, wherever those come from."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def fold_queries(
    queries: Float[Array, "batch seq heads head_dim"], kv_heads: int
) -> Float[Array, "batch kv_heads folded head_dim"]:
    """Scales queries, and puts those that share a key/value head into one axis with the positions of the block.

    Each key/value head is then read once, and both products of attention are plain batched matrix products.
    """
    batch, seq, heads, head_dim = queries.shape
    group = heads // kv_heads
    folded = queries.reshape(batch, seq, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    return folded.reshape(batch, kv_heads, group * seq, head_dim) / math.sqrt(head_dim)


def unfold_heads(mixed: Float[Array, "batch kv_heads folded head_dim"], seq: int) -> Float[Array, "batch seq mixed"]:
    """Inverts `fold_queries`, and joins all heads of a position into one vector."""
    batch, kv_heads, folded, head_dim = mixed.shape
    group = folded // seq
    mixed = mixed.reshape(batch, kv_heads, group, seq, head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, seq, kv_heads * group * head_dim)


def masked_scores(
    scores: Float[Array, "batch kv_heads folded slots"], mask: Bool[Array, "batch_or_1 seq slots"]
) -> Float[Array, "batch kv_heads folded slots"]:
    """Sets scores to minus infinity where a position does not attend to a slot."""
    batch, kv_heads, folded, slots = scores.shape
    seq = mask.shape[1]
    grouped = scores.reshape(batch, kv_heads, folded // seq, seq, slots)
    return jnp.where(mask[:, None, None], grouped, -jnp.inf).reshape(scores.shape)


def causal_mask(
    positions: Int[Array, "batch seq"], slot_positions: Int[Array, "batch_or_1 slots"], sliding_window: int | None
) -> Bool[Array, "batch seq slots"]:
    """Whether a position sees a slot: not if the slot lies after it, or too far before it."""
    distance = positions[:, :, None] - slot_positions[:, None, :]
    mask = distance >= 0
    return mask if sliding_window is None else mask & (distance < sliding_window)


def soft_capped(
    scores: Float[Array, "batch kv_heads folded slots"], cap: float | None
) -> Float[Array, "batch kv_heads folded slots"]:
    """`cap * tanh(scores / cap)`, which stays within the cap (Gemma 2, Riviere et al. 2024, section 2); `None`: as they
    are."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def attention(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    mask: Bool[Array, "batch_or_1 seq slots"],
    softcap: float | None = None,
) -> Float[Array, "batch seq heads*head_dim"]:
    """Grouped-query attention (Ainslie et al. 2023), softmax in float32."""
    folded = fold_queries(queries, keys.shape[1])
    scores = jnp.einsum("bkqd,bksd->bkqs", folded.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(masked_scores(soft_capped(scores, softcap), mask), axis=-1)
    mixed = jnp.einsum("bkqs,bksd->bkqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return unfold_heads(mixed, queries.shape[1])
