"""The pass over prompts that fills a cache, a piece of them at a time: what a layer makes of a position is then there
for one piece, and not for a prompt of thousands of tokens."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ._base import AbstractLanguageModel, Features
from ._cache import Cache

# Positions a pass. Weights are read once a pass: for so many positions that is little beside the products.
_CHUNK = 512


def fill_cache(
    model: AbstractLanguageModel,
    tokens: Int[Array, "batch seq"],
    cache: Cache,
    *,
    layers: tuple[int, ...] = (),
    chunk: int | None = None,
) -> tuple[Features, Cache]:
    """The features of right-padded prompts, and a cache with their keys and values.

    Short prompts take one pass. What is kept of longer ones besides the cache is their features.

    **Arguments:**

    - `tokens`: the prompts.
    - `cache`: empty, with room for them.
    - `layers`: as for `AbstractLanguageModel.hidden`.
    - `chunk`: positions a pass; by default 512.
    """
    batch, seq = tokens.shape
    chunk = _CHUNK if chunk is None else chunk
    positions = jnp.arange(seq, dtype=jnp.int32)
    if seq <= chunk:
        return model.hidden(tokens, jnp.broadcast_to(positions[None], tokens.shape), cache, layers=layers)

    def one_pass(cache, start):
        block = lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        places = jnp.broadcast_to(lax.dynamic_slice_in_dim(positions, start, chunk)[None], (batch, chunk))
        features, cache = model.hidden(block, places, cache, layers=layers)
        return cache, features

    # The last piece ends where the prompts do, so that none needs room beyond; it writes some positions once more.
    starts = [*range(0, seq - chunk, chunk), seq - chunk]
    cache, pieces = lax.scan(one_pass, cache, jnp.array(starts, jnp.int32))
    fresh = starts[-1] - starts[-2]

    def join(pieces: Array) -> Array:
        before = jnp.moveaxis(pieces[:-1], 0, 1).reshape(batch, -1, pieces.shape[-1])
        return jnp.concatenate([before, pieces[-1][:, chunk - fresh :]], axis=1)

    return jax.tree.map(join, pieces), cache
