"""What truncated sampling kept, recorded with each token: part of a row's buffers, and moved as they are."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from .._types import Support
from ..sampling import Categorical


def support_of(distribution: Categorical) -> Support | None:
    """What the distributions of some positions keep, likeliest first; `None` where that is not told, or everything."""
    if distribution.support is None:
        return None
    return Support(distribution.support, jnp.sum(distribution.logits > -jnp.inf, axis=-1, dtype=jnp.int32))


def empty_buffer(like: Support | None, new: int) -> Support | None:
    """Room for what `new` tokens of each row were drawn from.

    **Arguments:**

    - `like`: of any number of positions of the rows.
    """
    if like is None:
        return None
    rows, _, kept = like.ids.shape
    return Support(jnp.zeros((rows, new, kept), jnp.int32), jnp.zeros((rows, new), jnp.int32))


def written(buffer: Support | None, block: Support | None, starts: Int[Array, " rows"]) -> Support | None:
    """The buffer with a block of each row written at the row's own cursor."""

    def write(row: Array, block: Array, start: Int[Array, ""]) -> Array:
        return lax.dynamic_update_slice(row, block, (start, *[0] * (row.ndim - 1)))

    return jax.tree.map(lambda rows, blocks: jax.vmap(write)(rows, blocks, starts), buffer, block)
