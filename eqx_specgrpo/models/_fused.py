"""How several linear layers lie in one, so that each piece of it is a smaller layer of the same kind.

Queries, keys and values come out of one product, and so do the MLP's gate and up projections. Their outputs lie in
groups: a key/value head with its queries, a few gates with their ups. Divided over devices between groups, each device
has what belongs together, and nothing has to move (Shoeybi et al. 2019, "Megatron-LM",
[arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3, divides each of the layers by itself).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

AnyArray = TypeVar("AnyArray", bound=Array | np.ndarray)

# A group of the MLP: long enough for the vectors of a CPU, short enough that there are many.
_GATES_OF_A_GROUP = 16


@dataclasses.dataclass(frozen=True)
class Fused:
    """The outputs of several linear layers in the order in which one layer has them: group by group, and in each group
    as large a part of every layer.

    **Arguments:**

    - `sizes`: outputs of each of the layers.
    - `groups`: divides each of them.
    """

    sizes: tuple[int, ...]
    groups: int = 1

    def __post_init__(self):
        if any(size % self.groups for size in self.sizes):
            raise ValueError(
                f"{self.groups} groups do not divide layers of {self.sizes} outputs: give a divisor of all"
            )

    @property
    def group_size(self) -> int:
        """Outputs of one group."""
        return sum(self.sizes) // self.groups

    def joined(self, parts: Sequence[AnyArray]) -> AnyArray:
        """The layers' arrays as one, along their first axis."""
        if self.groups == 1 and len(parts) == 1:
            return parts[0]
        join = np.concatenate if isinstance(parts[0], np.ndarray) else jnp.concatenate
        grouped = [part.reshape(self.groups, -1, *part.shape[1:]) for part in parts]
        return join(grouped, axis=1).reshape(-1, *parts[0].shape[1:])  # pyright: ignore[reportReturnType]

    def parted(self, array: AnyArray) -> list[AnyArray]:
        """The inverse of `joined`."""
        grouped = array.reshape(self.groups, self.group_size, *array.shape[1:])
        return [
            grouped[:, start:end].reshape(size, *array.shape[1:])  # pyright: ignore[reportReturnType]
            for size, (start, end) in zip(self.sizes, self.places(), strict=True)
        ]

    def split(self, outputs: Float[Array, "*batch out"]) -> list[Float[Array, "*batch _"]]:
        """What the layers gave, each by itself."""
        batch = outputs.shape[:-1]
        grouped = outputs.reshape(*batch, self.groups, self.group_size)
        return [
            grouped[..., start:end].reshape(*batch, size)
            for size, (start, end) in zip(self.sizes, self.places(), strict=True)
        ]

    def merge(self, outputs: Sequence[Float[Array, "*batch _"]]) -> Float[Array, "*batch out"]:
        """The inverse of `split`."""
        batch = outputs[0].shape[:-1]
        grouped = [part.reshape(*batch, self.groups, -1) for part in outputs]
        return jnp.concatenate(grouped, axis=-1).reshape(*batch, -1)

    def places(self) -> list[tuple[int, int]]:
        """Where each layer begins and ends within a group."""
        ends = list(itertools.accumulate(size // self.groups for size in self.sizes))
        return list(zip([0, *ends[:-1]], ends, strict=True))


def fused_qkv(num_heads: int, num_kv_heads: int, head_dim: int) -> Fused:
    """Queries, keys and values: a group is a key/value head, with the queries that share it."""
    return Fused((num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim), num_kv_heads)


def fused_gate_up(intermediate_size: int) -> Fused:
    """Gate and up projections: a group is 16 of both, or fewer where the size has no such divisor."""
    return Fused((intermediate_size,) * 2, intermediate_size // math.gcd(intermediate_size, _GATES_OF_A_GROUP))
