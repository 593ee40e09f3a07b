"""The linear layer, and the one matrix product and the one look-up that all layers use.

The dtype of the weights is the dtype of the arithmetic: bfloat16 weights take bfloat16 operands and return float32, in
the forward and in both products of the backward. On CPU this is the difference between the fast bfloat16 kernels and a
conversion of the whole weight at every call: a bfloat16 *result* falls off the fast path, and so does autodiff's own
backward, which would multiply a float32 cotangent with a bfloat16 weight.
"""

import math
from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

# Up to here a float32 product on CPU is faster with the weight as its first operand: 1.8 times at 4 rows, 1.1 at 128.
_FEW_ROWS = 128
# The result then has to be turned, from [out, rows] to [rows, out]. For a large one a product with the identity is
# faster than a transposition, and changes no (finite) number: 49,152 tokens of 32 rows take 26.1 ms with the weight
# second, 21.3 transposed and 19.8 so (docs/experiments.md, 2026-11-28). Where the two meet was not measured closely.
_LARGEST_TO_TRANSPOSE = 400_000
# Up to here a large result is cheaper to turn than the weight is to rearrange; at 96 rows it is not.
_FEW_LARGE_ROWS = 64


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product over one axis of each, with a float32 result."""
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _matmul(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    return lax.platform_dependent(x.astype(weight.dtype), weight, cpu=_matmul_on_cpu, default=_matmul_as_written)


def _matmul_as_written(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    return dot(x, weight, (1, 1))


def _matmul_on_cpu(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    rows = x.shape[0]
    if weight.dtype == jnp.bfloat16:
        # One row takes a scalar path that is many times slower than two rows.
        return dot(x if rows > 1 else jnp.concatenate([x, x]), weight, (1, 1))[:rows]
    large = rows * weight.shape[0] > _LARGEST_TO_TRANSPOSE
    if rows == 1 or rows > (_FEW_LARGE_ROWS if large else _FEW_ROWS):
        return dot(x, weight, (1, 1))
    # The second operand is rearranged at every call, and the first is not. The barrier keeps XLA from making the
    # weight the second operand again.
    turned = lax.optimization_barrier(dot(weight, x, (1, 1)))
    return dot(jnp.eye(rows, dtype=turned.dtype), turned, (1, 1)) if large else turned.T


def _matmul_fwd(x, weight):
    return _matmul(x, weight), (x.astype(weight.dtype), weight)


def _matmul_bwd(residuals, cotangent):
    x, weight = residuals
    cotangent = cotangent.astype(weight.dtype)
    return dot(cotangent, weight, (1, 0)), weight_gradient(cotangent, x).astype(weight.dtype)


def weight_gradient(cotangent: Float[Array, "rows out"], x: Float[Array, "rows in"]) -> Float[Array, "out in"]:
    """`cotangent.T @ x` in float32."""
    rows, out = cotangent.shape
    if x.dtype == jnp.float32 or out % 2:
        return dot(cotangent, x, (0, 0))
    # A product over the leading axis of both operands has no bfloat16 kernel on CPU: XLA converts both to float32
    # first. It undoes every transposition that stands before such a product, but not the one that it makes itself
    # where an operand has two axes that stay.
    halves = cotangent.reshape(rows, 2, out // 2)
    product = lax.dot_general(halves, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return product.reshape(out, x.shape[1])


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def matmul(x: Float[Array, "*batch in"], weight: Float[Array, "out in"]) -> Float[Array, "*batch out"]:
    """`x @ weight.T` in the weight's dtype, with a float32 result.

    **Arguments:**

    - `x`: float32 input.
    - `weight`: `[out, in]`, as in checkpoints; float32 or bfloat16.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _matmul(rows, weight).reshape(*x.shape[:-1], weight.shape[0])


@jax.custom_vjp
def _gather(table: Float[Array, "size features"], index: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
    if table.dtype != jnp.bfloat16:
        return table[index].astype(jnp.float32)
    # On CPU a gather in bfloat16 converts the whole table to float32, one of plain bits does not. In a loop XLA would
    # take the view as bits out in front, and so make a copy of the whole table: it may not know that they don't change.
    table, index = lax.optimization_barrier((table, index))
    bits = lax.bitcast_convert_type(table, jnp.uint16)[index]
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


def _gather_fwd(table, index):
    return _gather(table, index), (table, index)


def _gather_bwd(residuals, cotangent):
    table, index = residuals
    # What belongs to one row is summed in float32 and rounded once.
    return jnp.zeros(table.shape, jnp.float32).at[index].add(cotangent).astype(table.dtype), None


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather(table: Float[Array, "size features"], index: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
    """Rows of a table of weights, in float32.

    **Arguments:**

    - `table`: float32 or bfloat16.
    - `index`: which rows.
    """
    return _gather(table, index)


class AbstractLinear(eqx.Module):
    """A linear map over the last axis, with any leading axes."""

    @abstractmethod
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """The map itself; float32 in and out."""


class Linear(AbstractLinear):
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
        return plus_bias(matmul(x, self.weight), self.bias)


def plus_bias(y: Float[Array, "*batch out"], bias: Float[Array, " out"] | None) -> Float[Array, "*batch out"]:
    """With the bias, if there is one, added in float32."""
    return y if bias is None else y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
