"""Random numbers by address: a function of a key and a counter, so that anyone who knows both gets the same number.

JAX's own `jax.random.bits` gives the words of a whole array and takes several times as long on CPU; drawing one number
for every token of a vocabulary, at every position, would then cost as much as the language model.
"""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_2x32(
    key_high: UInt32[Array, "*batch"],
    key_low: UInt32[Array, "*batch"],
    counter_high: UInt32[Array, "*batch"],
    counter_low: UInt32[Array, "*batch"],
) -> tuple[UInt32[Array, "*batch"], UInt32[Array, "*batch"]]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2):
    two random words for a key and a counter of two words each."""
    keys = (key_high, key_low, key_high ^ key_low ^ jnp.uint32(_PARITY))
    high, low = counter_high + keys[0], counter_low + keys[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            high = high + low
            low = (low << distance) | (low >> (32 - distance))
            low = low ^ high
        high = high + keys[(group + 1) % 3]
        low = low + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return high, low


def exponential_noise(keys: Key[Array, "*batch"], ids: Int[Array, "*batch ids"]) -> Float[Array, "*batch ids"]:
    """A standard exponential number for every key and token id: the same for a token whatever the other ids are.

    The smallest numbers are exact to float32, down to `2^-33`: they decide which of many unlikely tokens wins.

    **Arguments:**

    - `keys`: Threefry keys (JAX's default kind); one a position.
    - `ids`: token ids, not negative; those of each position.
    """
    words = jr.key_data(keys)
    counters = ids.astype(jnp.uint32)
    high, low = (jnp.broadcast_to(words[..., i, None], ids.shape) for i in range(2))
    bits, _ = threefry_2x32(high, low, jnp.zeros_like(counters), counters)
    # Above 0 and below 1, and dense near 0, where the winners are. The largest words would round to 1, whose number is
    # infinite: the only token that has any probability would not win then.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    return -jnp.log1p(-uniform)
