"""The devices that arrays live on, as an object that every part of a run is handed; one device is a case of its own."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, PyTree

from ._rules import DATA, Layout, parameter_spec, parameter_specs

Tree = TypeVar("Tree")
Device = Any  # of `jax.devices()`; type checkers are not told of the class


class AbstractDeviceMesh(eqx.Module):
    """Devices, and how arrays are placed on them.

    Rows are divided over the axis `data`: each shard of it runs the very program that one device runs, on rows of its
    own. Matrices may be divided over the axis `model`; that is left to the compiler, which follows the layout of the
    weights. An object of this kind has no arrays: a jitted function may take it as an argument.

    """

    @property
    @abstractmethod
    def data(self) -> int:
        """In how many shards rows are divided."""

    @property
    @abstractmethod
    def model(self) -> int:
        """Over how many devices the matrices of a copy of the weights are divided."""

    @property
    @abstractmethod
    def devices(self) -> tuple[Device, ...]:
        """All of them: those of the first shard of `data`, then those of the second, and so on."""

    @property
    @abstractmethod
    def is_addressable(self) -> bool:
        """Whether all devices are this process's own."""

    @abstractmethod
    def local(self) -> "AbstractDeviceMesh":
        """This process's own devices: a mesh with as many along `model`, and its own part of `data`.

        **Raises:**

        `UserError` if a copy of the weights is divided over devices of several processes.
        """

    @abstractmethod
    def for_rollouts(self) -> "AbstractDeviceMesh":
        """What this process decodes on: its own devices, or all of them where a copy of the weights is divided over
        devices of several processes. Then all processes decode the same prompts together."""

    @abstractmethod
    def specs(self, tree: PyTree, layout: Layout) -> PyTree:
        """How each array of parameters, gradients or optimizer state is divided: a tree of `PartitionSpec`, with `None`
        for what is no array. Arrays may be shapes, as `eqx.filter_eval_shape` gives them."""

    @abstractmethod
    def put(self, tree: PyTree, specs: PyTree) -> Any:
        """Places arrays, from the host or from other devices.

        Where devices belong to several processes, each of these has the same arrays, whole and on the host (or on a
        device of its own), and keeps its pieces.

        **Arguments:**

        - `tree`: NumPy or JAX arrays, keys of random numbers included; anything else in it is left alone.
        - `specs`: a `PartitionSpec` for all, or a tree of them with the structure of `tree`.
        """

    @abstractmethod
    def fetch(self, tree: PyTree) -> Any:
        """Whole arrays as NumPy arrays on the host; where devices belong to several processes, in each of them: all
        have to ask for the same at the same time."""

    @abstractmethod
    def readable(self, tree: Tree, keep: bool) -> Tree:
        """A tree whose arrays this process can read one after the other: as they are, or, where devices belong to
        several processes, whole ones on the host. Then all have to ask for the same at the same time, and one array at
        a time is whole on a device.

        **Arguments:**

        - `keep`: whether this process wants them; what it gets else is of no use.
        """

    @abstractmethod
    def agreed(self, *numbers: float) -> tuple[float, ...]:
        """Numbers that differ by process, such as times, as the first process has them. On devices of one process they
        are what was given."""

    @abstractmethod
    def constrain(self, tree: Tree, specs: PyTree) -> Tree:
        """Within a program: the same numbers, so divided.

        **Arguments:**

        - `specs`: as for `put`.
        """

    @abstractmethod
    def by_shard(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Within a program: a function of what one shard of `data` has, as a function of what all have
        (`jax.shard_map`).

        **Arguments:**

        - `function`: takes PyTrees, in which what is no array is a constant; returns PyTrees of arrays.
        - `in_specs`: one for each argument, of the axis `data` alone: `WHOLE`, `ROWS`, or a tree of specs.
        - `out_specs`: of what it returns, in the same way. What is `WHOLE` has to be the same in all shards: see
            `maximum` and `total`.
        """

    @abstractmethod
    def maximum(self, tree: Tree) -> Tree:
        """Within `by_shard`: the greatest of all shards'."""

    @abstractmethod
    def total(self, tree: Tree) -> Tree:
        """Within `by_shard`: the sum over all shards."""

    @abstractmethod
    def of_all(self, x: Array, axis: int = 0) -> Array:
        """Within `by_shard`: the arrays of all shards, one after the other along an axis."""

    @abstractmethod
    def own_part_of_total(self, x: Array, axis: int) -> Array:
        """Within `by_shard`: this shard's part, along an axis, of the sum over all shards (a reduce-scatter). The
        axis has to be divisible by `data`."""

    @abstractmethod
    def shard_index(self) -> Int[Array, ""]:
        """Within `by_shard`: which shard this is, from 0."""

    @abstractmethod
    def copies(self, tree: Tree) -> Tree:
        """Parameters in `Layout.COPY` on the devices of `for_rollouts`. Where devices belong to several processes, all
        of them have to ask for the same at the same time."""

    def data_specs(self, tree: PyTree, layout: Layout) -> PyTree:
        """As `specs`, of the axis `data` alone, as `by_shard` takes them."""
        return jax.tree.map(_of_data, self.specs(tree, layout), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    def sharding(self, spec: PartitionSpec) -> jax.sharding.Sharding | None:
        """Of an array that is so divided, as JAX takes it; `None` for wherever JAX puts arrays."""
        del spec
        return None

    def place(self, path: str, array: np.ndarray) -> Array:
        """One parameter in `Layout.MASTER`, as [`eqx_specgrpo.models.load_model`][] takes it: no device ever has more
        than its part.

        **Arguments:**

        - `path`: of the array in its model, names joined by points.
        - `array`: on the host.
        """
        return self.put(array, parameter_spec(path, array.shape, self.data, self.model, Layout.MASTER))

    def lay_out(self, tree: Tree, layout: Layout) -> Tree:
        """Parameters placed in a layout; see `put`."""
        return self.put(tree, self.specs(tree, layout))

    def laid_out(self, tree: Tree, layout: Layout) -> Tree:
        """Within a program: parameters in a layout; see `constrain`."""
        return self.constrain(tree, self.specs(tree, layout))

    def padded(self, count: int) -> int:
        """The least number, not below `count`, that all shards of `data` can have an equal part of."""
        return -(-count // self.data) * self.data


class OneDevice(AbstractDeviceMesh):
    """The one that JAX computes on by default. Nothing is divided, and every method leaves arrays as they are."""

    @property
    def data(self) -> int:
        return 1

    @property
    def model(self) -> int:
        return 1

    @property
    def devices(self):
        return (jax.local_devices()[0],)

    @property
    def is_addressable(self):
        return True

    def local(self):
        return self

    def for_rollouts(self):
        return self

    def specs(self, tree, layout):
        return parameter_specs(tree, 1, 1, layout)

    def put(self, tree, specs):
        del specs
        return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, tree)

    def fetch(self, tree):
        return jax.device_get(tree)

    def readable(self, tree, keep):
        del keep
        return tree

    def agreed(self, *numbers):
        return numbers

    def copies(self, tree):
        return self.lay_out(tree, Layout.COPY)

    def constrain(self, tree, specs):
        del specs
        return tree

    def by_shard(self, function, in_specs, out_specs):
        del in_specs, out_specs
        return function

    def maximum(self, tree):
        return tree

    def total(self, tree):
        return tree

    def of_all(self, x, axis=0):
        del axis
        return x

    def own_part_of_total(self, x, axis):
        del axis
        return x

    def shard_index(self):
        return jnp.int32(0)


def _of_data(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(axis if axis == DATA else None for axis in spec))
