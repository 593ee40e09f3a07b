"""Which dtype computes faster on this machine: measured, since a processor's list of features does not tell.

One processor has bfloat16 units that are twice as fast as its float32 ones, another many times, a third half as fast,
and a fourth none at all (docs/performance.md, "Precision").
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from ..models import matmul, platform_of
from ..runtime import SMALL_HIDDEN_SIZE

Dtype: TypeAlias = Literal["float32", "bfloat16"]

# A product of a round of decoding, and one of an update.
_FEW_ROWS, _MANY_ROWS = 16, 512
# A word is worth while where a step that spends as long in rounds as in the update would gain so much by the products
# alone, and neither of the two would lose much.
_WORTH_TELLING, _LEAST = 1.05, 0.85
_LARGEST_SIZE = 1024
_TURNS = 5


Measure: TypeAlias = Callable[[int, int], Mapping[Dtype, float]]
"""Seconds of products by dtype, given the rows and the size of a weight."""


def largest_of_products(
    inputs: Mapping[int, Float[Array, "rows _"]], weights: Sequence[Float[Array, "_ _"]]
) -> Float[Array, " weights"]:
    """Computes the largest entry of each product, to time products: a maximum needs every entry of its product.

    **Arguments:**

    - `inputs`: by their size.
    - `weights`: each takes the inputs of its size.
    """
    return jnp.stack([jnp.max(matmul(inputs[weight.shape[1]], weight)) for weight in weights])


def product_seconds(rows: int, size: int) -> dict[Dtype, float]:
    """Median seconds of the library's own product with weights of `[4 * size, size]`, too many for the caches of most
    processors where there are few rows. The dtypes take turns: a machine with other work slows both."""
    inputs = {size: jr.normal(jr.key(0), (rows, size))}
    weights = [jr.normal(jr.key(i), (4 * size, size)) for i in range(8 if rows < _MANY_ROWS else 1)]
    every: dict[Dtype, list[Array]] = {
        "float32": weights,
        "bfloat16": [weight.astype(jnp.bfloat16) for weight in weights],
    }

    products = jax.jit(largest_of_products)
    seconds: dict[Dtype, list[float]] = {dtype: [] for dtype in every}
    for _ in range(_TURNS + 1):
        for dtype, cast in every.items():
            begin = time.perf_counter()
            jax.block_until_ready(products(inputs, cast))
            seconds[dtype].append(time.perf_counter() - begin)
    # The first of each compiled.
    return {dtype: statistics.median(found[1:]) for dtype, found in seconds.items()}


def dtype_advice(dtype: Dtype, hidden_size: int, measure: Measure = product_seconds) -> str | None:
    """What to say to whoever computes in one dtype where the other one would make a step faster; `None` if there is
    nothing to say. Measures for a second where the default device is a CPU; elsewhere nothing is said.

    **Arguments:**

    - `dtype`: `model.dtype`.
    - `hidden_size`: the model's; products of this size are measured, none for a very small one.
    - `measure`: seconds of products.
    """
    if platform_of(()) != "cpu" or hidden_size <= SMALL_HIDDEN_SIZE:
        return None
    other: Dtype = "float32" if dtype == "bfloat16" else "bfloat16"
    measured = [measure(rows, min(hidden_size, _LARGEST_SIZE)) for rows in (_FEW_ROWS, _MANY_ROWS)]
    gains = [seconds[dtype] / seconds[other] for seconds in measured]
    if min(gains) < _LEAST or statistics.harmonic_mean(gains) < _WORTH_TELLING:
        return None
    price = "" if other == "float32" else "; master weights and losses stay float32"
    return (
        f"{other} products are {gains[0]:.1f} ({_FEW_ROWS} rows) to {gains[1]:.1f} times ({_MANY_ROWS}) as fast as "
        f"{dtype} ones on this machine: --set model.dtype={other} would make a step faster{price}"
    )
