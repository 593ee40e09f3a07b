"""A number that tells one state of a draft from another."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32

from ._base import AbstractDraft

_HIGH_BITS = 20  # with 32 low ones: a whole number that float64, and so JSON, holds exactly
_FACTORS = (2654435761, 2246822519)  # odd; of xxHash


def draft_digest(draft: AbstractDraft) -> int:
    """A number below 2^52 that is the same for the same weights to the bit, and another one for others.

    Of what can be trained; of a draft without weights of its own, of what it remembers. Computed on the device: sums of
    the bits, mixed with their places (by the last steps of MurmurHash3), so that it costs one reading of the weights.
    """
    trained = eqx.filter(draft, eqx.is_inexact_array)
    low, high = jax.device_get(_digest(trained if jax.tree.leaves(trained) else eqx.filter(draft, eqx.is_array)))
    return (int(high) & ((1 << _HIGH_BITS) - 1)) << 32 | int(low)


@eqx.filter_jit
def _digest(tree: PyTree) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    low, high = (_sum(tree, factor) for factor in _FACTORS)
    return low, high


def _sum(tree: PyTree, factor: int) -> UInt32[Array, ""]:
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = _bits(leaf).reshape(-1)
        mixed = _mixed(bits ^ (jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(factor)))
        total = _mixed(total + jnp.uint32(factor)) + jnp.sum(mixed, dtype=jnp.uint32)
    return total


def _mixed(bits: UInt32[Array, "*any"]) -> UInt32[Array, "*any"]:
    """Every bit of the result depends on all bits: a sum of such numbers does not cancel, as signs that flip would."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _bits(array: Array) -> UInt32[Array, "..."]:
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
