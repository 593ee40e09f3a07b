"""Rotary position embedding (Su et al. 2021) with the scalings that the supported families use."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._config import DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, TransformerConfig, YarnRope

RopeTable = tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]


def rope_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """Angular frequencies in radians a position, one a pair of dimensions. Host arithmetic in float64."""
    frequencies = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    match scaling:
        case None | DynamicRope():
            return frequencies
        case LinearRope(factor):
            return frequencies / factor
        case Llama3Rope(factor, low, high, original):
            wavelengths = 2 * math.pi / frequencies
            # 0 at wavelengths longer than original/low (divided by the factor), 1 at shorter than original/high (kept).
            keep = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
            return frequencies * (keep + (1 - keep) / factor)
        case YarnRope():
            keep = _yarn_ramp(rotary_dim, theta, scaling)
            return frequencies * (keep + (1 - keep) / scaling.factor)
        case LongRope():
            return frequencies / np.asarray(scaling.short_factor, np.float64)


def _yarn_ramp(rotary_dim: int, theta: float, yarn: YarnRope) -> Float[np.ndarray, " half"]:
    """1 for the frequencies that are kept, 0 for those that are divided."""

    def dimension(turns: float) -> float:
        return (
            rotary_dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / 2 / math.log(theta)
        )

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 if low == high else 0  # A ramp needs a width.
    return 1 - np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)


def rope_attention_factor(scaling: RopeScaling) -> float:
    """What turned queries and keys are multiplied by."""
    match scaling:
        case YarnRope() | LongRope():
            return scaling.attention_factor
        case _:
            return 1.0


def rope_table(
    positions: Int[Array, "batch seq"], frequencies: Float[np.ndarray, " half"], factor: float = 1.0
) -> RopeTable:
    """Cosines and sines for absolute positions, times `factor`; computed once a forward and shared by all layers."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # XLA takes cosines for cheap, and on CPU it would compute them again in every layer, for every head. Divisions it
    # computes once. (An optimization barrier is gone by the time it decides that.)
    one = (cos * cos + sin * sin) / factor
    return cos / one, sin / one


def rope_tables(positions: Int[Array, "batch seq"], config: TransformerConfig) -> tuple[RopeTable, ...]:
    """A table for each of `config.ropes`."""
    rotary_dim = config.rotary_dim or config.head_dim
    return tuple(
        rope_table(positions, rope_frequencies(rotary_dim, theta, scaling), rope_attention_factor(scaling))
        for theta, scaling in config.ropes
    )


def apply_rope(
    x: Float[Array, "batch seq heads head_dim"], table: RopeTable
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns dimension `i` with dimension `i + half`, the pairing of Hugging Face checkpoints. What lies beyond the
    table's pairs does not turn.

    Both halves are exchanged by a reversal, which XLA fuses with whatever takes the result. Two halves computed apart
    and concatenated were a kernel of their own on a GPU.
    """
    cos, sin = (t[:, :, None, :] for t in table)
    half = cos.shape[-1]
    turned, rest = jnp.split(x, [2 * half], axis=-1)
    pairs = turned.reshape(*x.shape[:-1], 2, half)
    sines = jnp.stack([-sin, sin], axis=-2)
    pairs = pairs * cos[..., None, :] + pairs[..., ::-1, :] * sines
    return jnp.concatenate([pairs.reshape(turned.shape), rest], axis=-1)
