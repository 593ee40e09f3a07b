"""The dtype that a model computes in, which is that of its matrices."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from ._platform import platform_of


def matrix_dtype(model: eqx.Module) -> DTypeLike:
    """Of the largest matrix; float32 if there is none. Norms and biases stay float32 whatever the rest is in. The
    model's arrays may be shapes."""
    matrices = [x for x in jax.tree.leaves(model) if _is_matrix(x)]
    return max(matrices, key=lambda x: x.size).dtype if matrices else jnp.dtype(jnp.float32)


def default_cache_dtype(model: eqx.Module) -> DTypeLike:
    """Of keys and values: that of the model's matrices, or on CPU float32, since a bfloat16 write would convert a whole
    cache. Never less precise than the model: else decoding and training would differ by more than its rounding."""
    return jnp.dtype(jnp.float32) if platform_of(model) == "cpu" else matrix_dtype(model)


def _is_matrix(x: Any) -> bool:
    is_array = eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
    return is_array and len(x.shape) > 1 and jnp.issubdtype(x.dtype, jnp.inexact)
