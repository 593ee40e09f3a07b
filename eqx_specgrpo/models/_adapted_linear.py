"""A linear layer whose weight is merged already, and whose gradients are those of the two small factors alone."""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ._fused import Fused
from ._linear import AbstractLinear, dot, matmul, plus_bias, weight_gradient


class LowRank(eqx.Module):
    """The factors of an update of a weight, `scale * up @ down`. Float32.

    A fresh one is zero: `up` is, and `down` is uniform between plus and minus one over the root of its inputs, as in
    PEFT. (There, `down` is called `lora_A` and `up` is called `lora_B`.)

    ??? cite

        Hu et al. 2021, "LoRA: low-rank adaptation of large language models",
        [arXiv:2106.09685](https://arxiv.org/abs/2106.09685), section 4.1.
    """

    down: Float[Array, "rank in"]
    up: Float[Array, "out rank"]

    def __init__(self, in_size: int, out_size: int, rank: int, *, key: PRNGKeyArray):
        bound = 1 / math.sqrt(in_size)
        self.down = jr.uniform(key, (rank, in_size), minval=-bound, maxval=bound)
        self.up = jnp.zeros((out_size, rank))


class AdaptedLinear(AbstractLinear):
    """The same function as a `Linear` with the merged weight, but another derivative.

    The forward has no product with the factors, so that it is the sampler's to the bit. The backward has the derivative
    by the factors at the place where they were merged, from products as narrow as the rank: no array of the weight's
    size comes up. The weight and the bias are constants.

    **Arguments:**

    - `weight`: merged, in the dtype of computation.
    - `bias`: as in `Linear`.
    - `factors`: those that were merged.
    - `order`: of the outputs: a weight may be several layers in one.
    - `layers`: which layers of `order` the factors belong to, as the first and the one after the last.
    - `scale`: of the factors' product.
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"] | None
    factors: tuple[LowRank, ...]
    order: Fused = eqx.field(static=True)
    layers: tuple[tuple[int, int], ...] = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    @jax.named_scope("AdaptedLinear")
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        rows = x.reshape(-1, x.shape[-1])
        y: Array = _adapted(self.order, self.layers, self.scale, rows, self.weight, self.factors)  # pyright: ignore
        return plus_bias(y.reshape(*x.shape[:-1], y.shape[-1]), self.bias)


@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _adapted(
    order: Fused,
    layers: tuple[tuple[int, int], ...],
    scale: float,
    x: Float[Array, "rows in"],
    weight: Float[Array, "out in"],
    factors: tuple[LowRank, ...],
) -> Float[Array, "rows out"]:
    del order, layers, scale, factors
    return matmul(x, weight)


def _adapted_fwd(order, layers, scale, x, weight, factors):
    del order, layers, scale
    return matmul(x, weight), (x.astype(weight.dtype), weight, factors)


def _adapted_bwd(order, layers, scale, residuals, cotangent):
    x, weight, factors = residuals
    cotangent = cotangent.astype(weight.dtype)
    cotangents = order.split(cotangent)

    def gradient(which: tuple[int, int], part: LowRank) -> LowRank:
        # Of `scale * up @ down`, with `cotangent.T @ x` for its own gradient, in the order that keeps it narrow.
        own = jnp.concatenate(cotangents[slice(*which)], axis=-1)
        inner = dot(own, part.up.astype(weight.dtype), (1, 0)).astype(weight.dtype)
        seen = dot(x, part.down.astype(weight.dtype), (1, 1)).astype(weight.dtype)
        both = scale * weight_gradient(inner, x), scale * weight_gradient(own, seen)
        return eqx.tree_at(lambda p: (p.down, p.up), part, both)

    return dot(cotangent, weight, (1, 0)), None, tuple(map(gradient, layers, factors))


_adapted.defvjp(_adapted_fwd, _adapted_bwd)
