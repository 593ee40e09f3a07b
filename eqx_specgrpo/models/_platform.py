"""Which kind of device computes with some arrays."""

from typing import Any, Literal

import jax
from jax.core import Tracer
from jax.sharding import Sharding
from jaxtyping import PyTree

Platform = Literal["cpu", "gpu", "tpu"]


def platform_of(tree: PyTree) -> Platform:
    """The kind of device that holds the arrays of a tree.

    What is faster on one kind of device than on another is chosen by this: dtypes of caches, the loop that repeats
    rounds, sizes of batches. Arrays of a traced function and shapes without a sharding lie nowhere. For them the answer
    is the kind of `jax.default_device` where that is set, and else of `jax.default_backend()`, which is where JAX puts
    an array that nobody places. So a program can be compiled for a device that this machine does not have.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not isinstance(leaf, Tracer):
            sharding = leaf.sharding
            if isinstance(sharding, Sharding):
                return _kind(next(iter(sharding.device_set)))
    config: Any = jax.config  # its options are known at run time only
    default = config.jax_default_device
    return _kind(jax.default_backend() if default is None else default)


def _kind(device: Any) -> Platform:
    """Of a device, or of the name of a platform. Devices of a kind that is not known are taken for accelerators."""
    platform = str(device) if isinstance(device, str) else device.platform
    if platform == "cpu":
        return "cpu"
    return "tpu" if platform == "tpu" else "gpu"
