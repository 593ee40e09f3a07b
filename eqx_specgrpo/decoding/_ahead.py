"""Which segments can be run at once, and what is to be compiled for those that can't."""

import time
from collections.abc import Hashable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..layout import AbstractDeviceMesh, OneDevice
from ._compiler import AbstractCompiler, CompileAtOnce, Lower, Lowered
from ._length import SegmentPlan
from ._prompts import AbstractPromptStore, PromptsInRows
from ._row_programs import keep_rows
from ._segment import AbstractSegmentLoop, run_segment
from ._start import Modules
from ._state import DecodeState

WHILE_WAITING = 8  # rounds of a segment that goes on in too large a batch: not long, since the smaller one comes


class SegmentPrograms:
    """The programs of one decoding.

    Nothing but speed depends on what is ready: a segment of another length, or of rows that have finished, emits the
    same distribution.

    **Arguments:**

    - `compiler`: compiles what is asked for, now or behind.
    - `modules`, `loop`: of the decoding.
    - `mesh`: of the decoding. Where it is of several devices all is compiled where it is run: shapes alone do not say
        how arrays lie on them.
    - `most_length`: the draft's.
    """

    def __init__(
        self,
        compiler: AbstractCompiler,
        modules: Modules,
        loop: AbstractSegmentLoop,
        mesh: AbstractDeviceMesh,
        most_length: int,
    ):
        self._compiler = compiler if isinstance(mesh, OneDevice) else CompileAtOnce()
        self._modules, self._loop, self._mesh = modules, loop, mesh
        self._most_length = most_length
        self._modules_name = _name_of(modules)
        self._run: set[Hashable] = set()
        self._behind: dict[Hashable, float] = {}
        self._step: Hashable = None  # to a smaller batch, the last that was asked for
        self._asked_at: float | None = None  # in vain

    @property
    def is_busy(self) -> bool:
        """See [`AbstractCompiler.is_busy`][eqx_specgrpo.decoding.AbstractCompiler.is_busy]."""
        return self._compiler.is_busy

    def compiled_behind(self, state: DecodeState, store: AbstractPromptStore, length: int) -> float:
        """Seconds that a segment's program took to compile while others ran; told once."""
        name = self._name(state, store, length)
        return self._behind.pop(name, 0.0) + self._compiler.seconds(name)

    def ready_plan(self, plan: SegmentPlan, state: DecodeState, store: AbstractPromptStore) -> SegmentPlan:
        """The plan, or one of the nearest length whose program is there; that of the plan is then being compiled. Of a
        plan to measure a length again, the other one where that length's program is not there.

        Where none is there, which is so for the first segment of a decoding that is unlike any before, it is the plan
        itself: it is compiled where it is run.
        """
        while plan.otherwise is not None and not self._compiler.is_there(self._name(state, store, plan.length)):
            plan = plan.otherwise
        others = [k for k in range(self._most_length + 1) if self._name(state, store, k) in self._run]
        # With nothing to go on with, it would be compiled here and in the thread at once.
        if not others or self._is_ready(state, store, plan.length):
            return plan
        nearest = min(others, key=lambda k: (abs(k - plan.length), k))
        return SegmentPlan(nearest, min(plan.max_rounds, WHILE_WAITING))

    def ran(self, state: DecodeState, store: AbstractPromptStore, length: int) -> None:
        """A segment was run: its program is there from now on."""
        name = self._name(state, store, length)
        self._run.add(name)
        self._compiler.ran(name)

    def shrunk(self, state: DecodeState, store: AbstractPromptStore, length: int) -> None:
        """The batch was shrunk to this state: a segment of this length, that of `shrunk_to`, is there."""
        self.ran(state, store, length)
        self._behind[self._name(state, store, length)] = self._compiler.seconds(self._step)

    def shrunk_to(
        self,
        state: DecodeState,
        store: AbstractPromptStore,
        rows: int,
        bucket: int,
        half: int,
        slots: int,
        length: int,
    ) -> int:
        """The batch to go on with: the smallest whose step and first segment are ready, of those that hold all active
        rows. What is asked for in vain is then being compiled, or later; half of the rows as soon as one has finished.

        **Arguments:**

        - `rows`: the batch as it is, of a shard.
        - `bucket`: the batch that the active rows need.
        - `half`: the next smaller one, 0 if there is none.
        - `slots`: as `keep_rows` takes them.
        - `length`: of the segment that would come first.
        """
        if half == 0:
            return rows
        now = time.perf_counter()
        waited, self._asked_at = 0.0 if self._asked_at is None else now - self._asked_at, None
        wanted = min(bucket, half)
        is_ready = self._can_shrink(state, store, wanted, slots, length, waited)
        if bucket == rows or is_ready:
            return rows if bucket == rows else bucket
        if half > bucket and self._can_shrink(state, store, half, slots, length, 0.0):
            return half
        self._asked_at = now
        return rows

    def _can_shrink(
        self, state: DecodeState, store: AbstractPromptStore, bucket: int, slots: int, length: int, waited: float
    ) -> bool:
        def plan() -> Lower:
            state_shapes, store_shapes = _shapes(state), _shapes(store)
            rows = jax.ShapeDtypeStruct((bucket,), jnp.int32)

            def make() -> Sequence[Lowered]:
                smaller = eqx.filter_eval_shape(keep_rows, state_shapes, store_shapes, rows, slots, self._mesh)
                step = lower(keep_rows, state_shapes, store_shapes, rows, slots, self._mesh)
                return [step, self._segment(smaller, PromptsInRows(), length)]

            return make

        self._step = ("shrink", self._name(state, store, length), bucket, slots)
        return self._compiler.may_shrink(self._step, plan, waited)

    def _is_ready(self, state: DecodeState, store: AbstractPromptStore, length: int) -> bool:
        name = self._name(state, store, length)

        def plan() -> Lower:
            state_shapes, store_shapes = _shapes(state), _shapes(store)
            return lambda: [self._segment(state_shapes, store_shapes, length)]

        return name in self._run or self._compiler.ready(name, plan)

    def _segment(self, state: PyTree, store: PyTree, length: int) -> Lowered:
        number = jax.ShapeDtypeStruct((), jnp.int32)
        below = jax.ShapeDtypeStruct((self._mesh.data,), jnp.int32)
        context = (_shapes(self._modules), store, self._loop)
        return lower(run_segment, context, state, number, below, length, self._mesh, number)

    def _name(self, state: DecodeState, store: AbstractPromptStore, length: int) -> Hashable:
        shapes = [state.tokens.shape, *(x.shape for x in jax.tree.leaves((state.cache[:1], state.draft, store)))]
        return self._modules_name, self._loop, type(store), tuple(shapes), length


def lower(function: Any, *arguments: Any) -> Lowered:
    """A function that `eqx.filter_jit` made, lowered for shapes: it asks for arrays, and tracers are such."""
    dynamic, static = eqx.partition(arguments, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    lowered = []

    def inner(dynamic: PyTree) -> None:
        lowered.append(function.lower(*eqx.combine(dynamic, static)))

    jax.eval_shape(inner, dynamic)
    return lowered[0]


def _shapes(tree: PyTree) -> PyTree:
    def shape(x: Any) -> Any:
        if isinstance(x, jax.Array):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.aval.weak_type)
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, np.ndarray) else x

    return jax.tree.map(shape, tree)


def _name_of(modules: Modules) -> Hashable:
    leaves, structure = jax.tree.flatten(modules)
    return structure, tuple((x.shape, str(x.dtype)) if eqx.is_array(x) else x for x in leaves)
