"""What a layer's attention sees in training: the block itself, and a prompt that several rows begin with."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from ._cache import AbstractLayerCache
from ._segments import Extent, Segment
from ._sequence_attention import attend_to_segments


class NoCache(AbstractLayerCache):
    """The null cache: a block attends to itself only. What training and a single forward use."""

    def attend(self, queries, keys, values, positions, sliding_window, softcap=None):
        start = positions[:, 0]
        extent = Extent(start, jnp.full_like(start, positions.shape[1]))
        return attend_to_segments(
            queries, extent, (Segment(keys, values, None, extent),), sliding_window, softcap
        ), self


class PrefixCache(AbstractLayerCache):
    """Keys and values of prompts, each stored once, which rows attend to besides their own; those are not kept.

    **Arguments:**

    - `keys`, `values`: of the prompts.
    - `prompt_lengths`: what is right of them is padding.
    - `prompt_of_row`: which prompt each row follows.
    - `lengths`: of the rows' own blocks; what is right of them is padding.
    """

    keys: Float[Array, "prompts kv_heads prompt head_dim"]
    values: Float[Array, "prompts kv_heads prompt head_dim"]
    prompt_lengths: Int[Array, " prompts"]
    prompt_of_row: Int[Array, " batch"]
    lengths: Int[Array, " batch"]

    def attend(self, queries, keys, values, positions, sliding_window, softcap=None):
        keys, values = keys.astype(self.keys.dtype), values.astype(self.values.dtype)
        prompt = Extent(jnp.zeros_like(self.lengths), self.prompt_lengths[self.prompt_of_row])
        extent = Extent(positions[:, 0], self.lengths)
        segments = (
            Segment(self.keys, self.values, self.prompt_of_row, prompt),
            Segment(keys, values, None, extent),
        )
        return attend_to_segments(queries, extent, segments, sliding_window, softcap), self


class PrefixPass(AbstractLayerCache):
    """What prompts go through: each attends to itself, and its keys and values become a `PrefixCache`.

    **Arguments:**

    - `prompt_lengths`: what is right of them is padding.
    - `prompt_of_row`: which prompt each row that will follow has.
    - `lengths`: of those rows' blocks.
    - `dtype`: of the operands of attention, here and in the rows.
    """

    prompt_lengths: Int[Array, " prompts"]
    prompt_of_row: Int[Array, " batch"]
    lengths: Int[Array, " batch"]
    dtype: DTypeLike = eqx.field(static=True, default=jnp.float32)

    def attend(self, queries, keys, values, positions, sliding_window, softcap=None):
        keys, values = keys.astype(self.dtype), values.astype(self.dtype)
        extent = Extent(positions[:, 0], self.prompt_lengths)
        mixed = attend_to_segments(queries, extent, (Segment(keys, values, None, extent),), sliding_window, softcap)
        return mixed, PrefixCache(keys, values, self.prompt_lengths, self.prompt_of_row, self.lengths)
