"""The linear layer, and the one matrix product that all layers use.

The dtype of the weights is the dtype of the arithmetic: bfloat16 weights take bfloat16 operands and return float32, in
the forward and in both products of the backward. On CPU this is the difference between the fast bfloat16 kernels and a
conversion of the whole weight at every call: a bfloat16 *result* falls off the fast path, and so does autodiff's own
backward, which would multiply a float32 cotangent with a bfloat16 weight.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _matmul(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    if x.shape[0] == 1 and weight.dtype == jnp.bfloat16:
        # One row takes a scalar path that is many times slower than two rows on CPU.
        return _dot(jnp.concatenate([x, x]).astype(weight.dtype), weight, (1, 1))[:1]
    return _dot(x.astype(weight.dtype), weight, (1, 1))


def _matmul_fwd(x, weight):
    return _matmul(x, weight), (x.astype(weight.dtype), weight)


def _matmul_bwd(residuals, cotangent):
    x, weight = residuals
    cotangent = cotangent.astype(weight.dtype)
    return _dot(cotangent, weight, (1, 0)), _dot(cotangent, x, (0, 0)).astype(weight.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def matmul(x: Float[Array, "*batch in"], weight: Float[Array, "out in"]) -> Float[Array, "*batch out"]:
    """`x @ weight.T` in the weight's dtype, with a float32 result.

    **Arguments:**

    - `x`: float32 input.
    - `weight`: `[out, in]`, as in checkpoints; float32 or bfloat16.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _matmul(rows, weight).reshape(*x.shape[:-1], weight.shape[0])


class Linear(eqx.Module):
    """`weight @ x + bias` over the last axis, any leading axes.

    **Arguments:**

    - `weight`: `[out, in]`.
    - `bias`: `[out]`, or `None`. Added in float32.
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"] | None

    def __init__(self, in_size: int, out_size: int, *, use_bias: bool, key: PRNGKeyArray):
        self.weight = jr.normal(key, (out_size, in_size)) / math.sqrt(in_size)
        self.bias = jnp.zeros(out_size) if use_bias else None

    @jax.named_scope("Linear")
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = matmul(x, self.weight)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(jnp.float32), y.shape)
        return y
