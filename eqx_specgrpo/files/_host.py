"""Arrays on the host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def on_host(x: Any) -> np.ndarray:
    """An array on the host, once: `np.asarray` of an array on a device, or divided over several, stays with that array
    as long as it lives, so that reading one array after the other would leave all of them in the host's memory."""
    if not isinstance(x, jax.Array) or (len(x.devices()) == 1 and next(iter(x.devices())).platform == "cpu"):
        return np.asarray(x)
    return np.asarray(jnp.copy(x))
