"""Which dtype computes faster on this machine: measured, since a processor's list of features does not tell.

One processor has bfloat16 units that are twice as fast as its float32 ones, another many times, a third half as fast,
and a fourth none at all (docs/performance.md, "Precision").
"""

import statistics
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr

from ..models import matmul

Dtype: TypeAlias = Literal["float32", "bfloat16"]

# A product of a round of decoding, and one of an update.
_FEW_ROWS, _MANY_ROWS = 16, 512
# From so many times as fast on, both with few rows and with many, a word is worth while. Products are not all of a run.
_WORTH_TELLING = 1.25
# A model that computes in moments is not asked for: its run would be over before it had gained what measuring takes.
_SMALL_HIDDEN_SIZE = 256
_LARGEST_SIZE = 1024


Measure: TypeAlias = Callable[[Dtype, int, int], float]
"""Seconds of products in a dtype, given the rows and the size of a weight."""


def product_seconds(dtype: Dtype, rows: int, size: int) -> float:
    """Median seconds of the library's own product with weights of `[4 * size, size]`, too many for the caches of most
    processors where there are few rows."""
    inputs = jr.normal(jr.key(0), (rows, size))
    weights = [jr.normal(jr.key(i), (4 * size, size)).astype(dtype) for i in range(8 if rows < _MANY_ROWS else 1)]

    @jax.jit
    def products(inputs, weights):
        # A maximum needs every entry, so that no product can be left out.
        return jnp.stack([jnp.max(matmul(inputs, weight)) for weight in weights])

    def seconds() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(products(inputs, weights))
        return time.perf_counter() - begin

    seconds()
    return statistics.median(seconds() for _ in range(5))


def dtype_advice(dtype: Dtype, hidden_size: int, measure: Measure = product_seconds) -> str | None:
    """What to say to whoever computes in one dtype where the other one is clearly faster, in rollouts as in updates;
    `None` if there is nothing to say. Takes a second.

    **Arguments:**

    - `dtype`: `model.dtype`.
    - `hidden_size`: the model's; products of this size are measured, none for a very small one.
    - `measure`: seconds of products.
    """
    if hidden_size <= _SMALL_HIDDEN_SIZE:
        return None
    size = min(hidden_size, _LARGEST_SIZE)
    other: Dtype = "float32" if dtype == "bfloat16" else "bfloat16"
    gains = [measure(dtype, rows, size) / measure(other, rows, size) for rows in (_FEW_ROWS, _MANY_ROWS)]
    if min(gains) < _WORTH_TELLING:
        return None
    price = "" if other == "float32" else "; master weights and losses stay float32"
    return (
        f"{other} products are {gains[0]:.1f} ({_FEW_ROWS} rows) to {gains[1]:.1f} times ({_MANY_ROWS}) as fast as "
        f"{dtype} ones on this machine: --set model.dtype={other} would be faster{price}"
    )
