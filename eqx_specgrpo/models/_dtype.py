"""The dtype that a model computes in, which is that of its matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike


def matrix_dtype(model: eqx.Module) -> DTypeLike:
    """Of the largest matrix; float32 if there is none. Norms and biases stay float32 whatever the rest is in."""
    matrices = [x for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)) if x.ndim > 1]
    return max(matrices, key=lambda x: x.size).dtype if matrices else jnp.dtype(jnp.float32)


def default_cache_dtype(model: eqx.Module) -> DTypeLike:
    """Of keys and values: the model's own, so that what decoding says of a token is what training says. Float32 on CPU,
    where a bfloat16 write would convert the whole cache."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else matrix_dtype(model)
