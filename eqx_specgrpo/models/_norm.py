"""RMSNorm (Zhang and Sennrich 2019), always in float32."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_normalize(x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    """`x / rms(x)` over the last axis, without a weight; a zero vector stays zero, with a finite gradient."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)


class RMSNorm(eqx.Module):
    """`x / rms(x) * (weight + offset)` over the last axis."""

    weight: Float[Array, " size"]
    eps: float = eqx.field(static=True)
    offset: float = eqx.field(static=True)

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        self.weight = jnp.full(size, 1.0 - offset)
        self.eps = eps
        self.offset = offset

    @jax.named_scope("RMSNorm")
    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        return self.scaled(x, self.scale(x))

    def scale(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch 1"]:
        """One over the root of the mean square."""
        return lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)

    def scaled(self, x: Float[Array, "*batch size"], scale: Float[Array, "*batch 1"]) -> Float[Array, "*batch size"]:
        """`x` times its `scale` and the weight."""
        weight = self.weight.astype(jnp.float32)
        weight = weight + self.offset if self.offset else weight
        return x * scale * jnp.broadcast_to(weight, x.shape)
