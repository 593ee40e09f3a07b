"""Several devices, and how arrays are placed on them."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, PyTree

from ..errors import UserError
from ._mesh import AbstractDeviceMesh, Device, OneDevice
from ._rules import DATA, MODEL, WHOLE, Layout, parameter_specs

Tree = TypeVar("Tree")


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
        has_to_move = _with_specs(self._has_to_move, tree, specs)
        moved = jax.tree.map(lambda x, moves: x if moves is True else None, tree, has_to_move)
        others = jax.tree.map(lambda x, moves: None if moves is True else x, tree, has_to_move)
        if jax.tree.leaves(moved):
            moved = _constrained(moved, self, specs)
        others = _with_specs(lambda x, spec: _placed(x, NamedSharding(self.mesh, spec)), others, specs)
        return eqx.combine(moved, others)

    def _has_to_move(self, x: Any, spec: PartitionSpec) -> bool:
        """Whether an array is on these devices, and divided otherwise."""
        if not isinstance(x, jax.Array) or not isinstance(x.sharding, NamedSharding) or x.sharding.mesh != self.mesh:
            return False
        return not x.sharding.is_equivalent_to(NamedSharding(self.mesh, spec), x.ndim)

    def fetch(self, tree):
        if not self.is_addressable:
            arrays, others = eqx.partition(tree, eqx.is_array)
            tree = eqx.combine(_whole_everywhere(arrays, self.mesh), others)
        return jax.device_get(tree)

    def readable(self, tree, keep):
        def one(x: Any) -> Any:
            if not isinstance(x, jax.Array) or x.is_fully_addressable:
                return x
            whole = x if x.is_fully_replicated else _whole_everywhere(x, self.mesh)
            return jax.device_get(whole) if keep else None

        return tree if self.is_addressable else jax.tree.map(one, tree)

    def agreed(self, *numbers):
        if self.is_addressable:
            return numbers
        # A float64 would be rounded on its way through a device.
        return tuple(multihost_utils.broadcast_one_to_all(np.asarray(numbers, np.float32)).tolist())

    def copies(self, tree):
        own, whole = self.for_rollouts(), self.lay_out(tree, Layout.COPY)
        if own is self:
            return whole
        jax.block_until_ready(whole)  # what comes next is this process's own work, in which it can wait for no other
        shardings = own.specs(whole, Layout.COPY)

        def one(x: jax.Array, spec: PartitionSpec | None) -> Any:
            if spec is None:
                return x
            pieces = {shard.device: shard.data for shard in x.addressable_shards}
            on_own = [pieces[device] for device in own.devices]
            return jax.make_array_from_single_device_arrays(x.shape, own.sharding(spec), on_own)

        return jax.tree.map(one, whole, shardings)

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


def _with_specs(function: Callable[[Any, PartitionSpec], Any], tree: Tree, specs: PyTree) -> Tree:
    if isinstance(specs, PartitionSpec):
        return jax.tree.map(lambda x: function(x, specs), tree)

    def one(x: Any, spec: PartitionSpec | None) -> Any:
        return x if x is None or spec is None else function(x, spec)

    return jax.tree.map(one, tree, specs, is_leaf=lambda leaf: leaf is None)


def _is_key(x: Any) -> TypeGuard[jax.Array]:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _placed(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if not eqx.is_array_like(x) or isinstance(x, bool | int | float | complex):
        return x
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if _is_key(x):
        data = _placed(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
