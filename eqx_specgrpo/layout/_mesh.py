"""The devices that arrays live on, as an object that every part of a run is handed; one device is a case of its own."""

import functools as ft
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from ..errors import UserError
from ._rules import DATA, MODEL, WHOLE, Layout, parameter_specs

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

    def for_updates(self) -> "AbstractDeviceMesh":
        """What this process updates weights on: its own devices. Each process computes the whole update."""
        return self.local()

    def data_specs(self, tree: PyTree, layout: Layout) -> PyTree:
        """As `specs`, of the axis `data` alone, as `by_shard` takes them."""
        return jax.tree.map(_of_data, self.specs(tree, layout), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    def sharding(self, spec: PartitionSpec) -> jax.sharding.Sharding | None:
        """Of an array that is so divided, as JAX takes it; `None` for wherever JAX puts arrays."""
        del spec
        return None

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

    def agreed(self, *numbers):
        return numbers

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


class DeviceMesh(AbstractDeviceMesh):
    """Several devices, of one process or of many.

    **Arguments:**

    - `mesh`: with the axes `data` and `model`, both of `AxisType.Auto`; see [`eqx_specgrpo.layout.make_mesh`][].
    """

    mesh: Mesh = eqx.field(static=True)

    def __check_init__(self):
        if self.mesh.axis_names != (DATA, MODEL):
            raise ValueError(
                f"the mesh has the axes {self.mesh.axis_names}, but they must be ('{DATA}', '{MODEL}'): see make_mesh"
            )
        if any(kind is not jax.sharding.AxisType.Auto for kind in self.mesh.axis_types):
            raise ValueError(
                "the axes of the mesh must be of AxisType.Auto, as jax.sharding.Mesh makes them, not jax.make_mesh"
            )

    @property
    def data(self) -> int:
        return self.mesh.shape[DATA]

    @property
    def model(self) -> int:
        return self.mesh.shape[MODEL]

    @property
    def devices(self):
        return tuple(self.mesh.devices.flat)

    @property
    def is_addressable(self):
        return all(device.process_index == jax.process_index() for device in self.devices)

    @property
    def _is_own(self) -> Bool[np.ndarray, "data model"]:
        """Whether a device is this process's."""
        return np.vectorize(lambda device: device.process_index == jax.process_index())(self.mesh.devices)

    def local(self):
        if self.is_addressable:
            return self
        own = self._is_own
        if (own.any(1) != own.all(1)).any():
            raise UserError(
                f"a copy of the weights is divided over {self.model} devices (devices.model), which belong to several "
                "processes: there is no mesh of one process's own devices to decode on"
            )
        return DeviceMesh(Mesh(self.mesh.devices[own[:, 0]], (DATA, MODEL)))

    def for_rollouts(self):
        own = self._is_own
        return self if (own.any(1) != own.all(1)).any() else self.local()

    def specs(self, tree, layout):
        return parameter_specs(tree, self.data, self.model, layout)

    def put(self, tree, specs):
        # What is on these devices already is moved by a program: the host has no part in it.
        here, others = eqx.partition(tree, lambda x: self._is_here(x))
        if jax.tree.leaves(here):
            here = _constrained(here, self, specs)
        others = _with_specs(lambda x, spec: _placed(x, NamedSharding(self.mesh, spec)), others, specs)
        return eqx.combine(here, others)

    def _is_here(self, x: Any) -> bool:
        return isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == self.mesh

    def fetch(self, tree):
        if not self.is_addressable:
            arrays, others = eqx.partition(tree, eqx.is_array)
            tree = eqx.combine(_whole_everywhere(arrays, self.mesh), others)
        return jax.device_get(tree)

    def agreed(self, *numbers):
        if self.is_addressable:
            return numbers
        # A float64 would be rounded on its way through a device.
        return tuple(multihost_utils.broadcast_one_to_all(np.asarray(numbers, np.float32)).tolist())

    def constrain(self, tree, specs):
        def one(x: Any, spec: PartitionSpec) -> Any:
            return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec)) if eqx.is_array(x) else x

        return _with_specs(one, tree, specs)

    def by_shard(self, function, in_specs, out_specs):
        if self.data == 1:  # XLA refuses sums over an axis of one device beside another that it divides by itself.
            return function

        def of_all(*arguments):
            arrays, constants = eqx.partition(arguments, eqx.is_array)
            return jax.shard_map(
                lambda *arrays: function(*eqx.combine(arrays, constants)),
                mesh=self.mesh,
                in_specs=in_specs,
                out_specs=out_specs,
                axis_names={DATA},
                # A user's own draft may begin a loop with plain zeros, which then would be an error.
                check_vma=False,
            )(*arrays)

        return of_all

    def maximum(self, tree):
        return tree if self.data == 1 else jax.tree.map(lambda x: lax.pmax(x, DATA), tree)

    def total(self, tree):
        return tree if self.data == 1 else jax.tree.map(lambda x: lax.psum(x, DATA), tree)

    def of_all(self, x, axis=0):
        return x if self.data == 1 else lax.all_gather(x, DATA, axis=axis, tiled=True)

    def own_part_of_total(self, x, axis):
        return x if self.data == 1 else lax.psum_scatter(x, DATA, scatter_dimension=axis, tiled=True)

    def shard_index(self):
        return jnp.int32(0) if self.data == 1 else lax.axis_index(DATA)

    def sharding(self, spec):
        return NamedSharding(self.mesh, spec)


def make_mesh(model: int = 1, devices: Sequence[Device] | None = None) -> AbstractDeviceMesh:
    """All devices, `model` of them, next to each other, for each copy of the weights; `OneDevice` where there is one.

    **Arguments:**

    - `model`: over how many devices the matrices of a copy of the weights are divided.
    - `devices`: by default all that JAX has, of all processes.

    **Raises:**

    `UserError` if the devices can't be divided so.
    """
    devices = jax.devices() if devices is None else devices
    if model < 1 or len(devices) % model:
        raise UserError(
            f"devices.model = {model}, but there are {len(devices)} devices, which can't be divided into groups of so "
            f"many: set devices.model to one of {[n for n in range(1, len(devices) + 1) if len(devices) % n == 0]}"
        )
    if len(devices) == 1 and devices[0] == jax.local_devices()[0]:
        return OneDevice()
    return DeviceMesh(Mesh(np.asarray(devices).reshape(-1, model), (DATA, MODEL)))


@eqx.filter_jit
def _constrained(tree: Tree, mesh: AbstractDeviceMesh, specs: PyTree) -> Tree:
    return mesh.constrain(tree, specs)


@ft.partial(jax.jit, static_argnums=1)
def _whole_everywhere(arrays: PyTree, mesh: Mesh) -> PyTree:
    return lax.with_sharding_constraint(arrays, NamedSharding(mesh, WHOLE))


def _of_data(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(axis if axis == DATA else None for axis in spec))


def _with_specs(function: Callable[[Any, PartitionSpec], Any], tree: Tree, specs: PyTree) -> Tree:
    if isinstance(specs, PartitionSpec):
        return jax.tree.map(lambda x: function(x, specs), tree)

    def one(x: Any, spec: PartitionSpec | None) -> Any:
        return x if x is None or spec is None else function(x, spec)

    return jax.tree.map(one, tree, specs, is_leaf=lambda leaf: leaf is None)


def _is_key(x: Any) -> TypeGuard[jax.Array]:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _placed(x: Any, sharding: NamedSharding) -> Any:
    if not eqx.is_array_like(x) or isinstance(x, bool | int | float | complex):
        return x
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if _is_key(x):
        data = _placed(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
