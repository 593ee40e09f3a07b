"""Rotary position embedding (Su et al. 2021) with the scalings that the supported families use."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._config import LinearRope, Llama3Rope, RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """Angular frequencies in radians a position, one a pair of dimensions. Host arithmetic in float64."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match scaling:
        case None:
            return frequencies
        case LinearRope(factor):
            return frequencies / factor
        case Llama3Rope(factor, low, high, original):
            wavelengths = 2 * math.pi / frequencies
            # 0 at wavelengths longer than original/low (divided by the factor), 1 at shorter than original/high (kept).
            keep = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
            return frequencies * (keep + (1 - keep) / factor)


def rope_table(
    positions: Int[Array, "batch seq"], frequencies: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """Cosines and sines for absolute positions; computed once a forward and shared by all layers."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # XLA takes cosines for cheap, and on CPU it would compute them again in every layer, for every head. Divisions it
    # computes once. (An optimization barrier is gone by the time it decides that.)
    one = cos * cos + sin * sin
    return cos / one, sin / one


def apply_rope(
    x: Float[Array, "batch seq heads head_dim"],
    table: tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]],
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns dimension `i` with dimension `i + head_dim / 2`, the pairing of Hugging Face checkpoints."""
    cos, sin = (t[:, :, None, :] for t in table)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
