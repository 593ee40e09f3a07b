"""Segments of rounds: what the device does between two looks of the host, and when the host looks."""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from ..layout import ROWS, WHOLE, AbstractDeviceMesh, OneDevice
from ..models import AbstractLanguageModel, platform_of
from ..runtime import CompileCounter
from ._length import SegmentObservation, SegmentPlan
from ._prompts import AbstractPromptStore
from ._round import decode_round
from ._start import Modules
from ._state import DecodeState


class AbstractSegmentLoop(eqx.Module):
    """The loop that runs decoding rounds on the device. It affects speed only: running further rounds on a finished row
    leaves the row unchanged.

    - `ahead`: how many segments the device has been given before the host looks at an earlier one.
    """

    ahead: eqx.AbstractVar[int]

    @abstractmethod
    def most_rounds(self, max_rounds: int) -> int:
        """The most rounds of a segment that is asked for so many: rows must have room for what all of them emit."""

    @abstractmethod
    def run(
        self,
        decode_once: Callable[[DecodeState], DecodeState],
        state: DecodeState,
        max_rounds: Int[Array, ""],
        goes_on: Callable[[DecodeState], Bool[Array, ""]],
    ) -> tuple[DecodeState, Int[Array, ""]]:
        """A segment.

        **Arguments:**

        - `decode_once`: one round.
        - `max_rounds`: a segment need not be longer.
        - `goes_on`: nor go on when this is false of the state: enough rows have finished. All shards of a mesh get the
            same answer.

        **Returns:**

        The state, and the number of rounds.
        """


class UntilRowsFinish(AbstractSegmentLoop):
    """Ends a segment as soon as rows can be removed from the batch or added to it. Meant for CPUs, where it costs
    nothing to check this after each round."""

    ahead: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        _check_ahead(self.ahead)

    def most_rounds(self, max_rounds):
        return max_rounds

    def run(self, decode_once, state, max_rounds, goes_on):
        def more(carry):
            state, rounds = carry
            return goes_on(state) & (rounds < max_rounds)

        def body(carry):
            state, rounds = carry
            return decode_once(state), rounds + 1

        return lax.while_loop(more, body, (state, jnp.int32(0)))


class FixedRounds(AbstractSegmentLoop):
    """Always as many rounds, and the host looks one segment late: the device is never asked, and never waits. For GPUs,
    where a loop that ends by what it computed stops the device after every round.

    **Arguments:**

    - `rounds`: of a segment. When rows finish, up to twice as many rounds are run before they are taken out.
    - `ahead`: segments in flight besides the one that is looked at.
    """

    rounds: int = eqx.field(static=True, default=8)
    ahead: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        _check_ahead(self.ahead)
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}, but a segment has at least one")

    def most_rounds(self, max_rounds):
        del max_rounds
        return self.rounds

    def run(self, decode_once, state, max_rounds, goes_on):
        del max_rounds, goes_on
        return lax.fori_loop(0, self.rounds, lambda _, state: decode_once(state), state), jnp.int32(self.rounds)


def _check_ahead(ahead: int) -> None:
    if ahead < 0:
        raise ValueError(f"ahead is {ahead}, but it is a number of segments, from 0")


def default_loop(target: AbstractLanguageModel) -> AbstractSegmentLoop:
    """Returns the loop that suits the device that holds the target."""
    return UntilRowsFinish() if platform_of(target) == "cpu" else FixedRounds()


class SegmentReport(eqx.Module):
    """Statistics of a segment for the host, in arrays of its own: the state is donated to the next segment.

    **Arguments:**

    - `active`: rows that are not finished at its end.
    - `finite`: whether all logits so far were finite.
    - `rounds`: rounds run.
    - `accepted`, `active_rounds`, `tokens`: of this segment, summed over rows.
    - `tokens_in_all`, `longest`: that the rows have emitted so far, together and the longest of them.
    """

    active: Bool[Array | np.ndarray, " rows"]
    finite: Bool[Array | np.ndarray, ""]
    rounds: Int[Array | np.ndarray, ""]
    accepted: Int[Array | np.ndarray, " max_draft"]
    active_rounds: Int[Array | np.ndarray, ""]
    tokens: Int[Array | np.ndarray, ""]
    tokens_in_all: Int[Array | np.ndarray, ""]
    longest: Int[Array | np.ndarray, ""]


@eqx.filter_jit(donate="all-except-first")
def run_segment(
    context: tuple[Modules, AbstractPromptStore, AbstractSegmentLoop],
    state: DecodeState,
    max_rounds: Int[Array, ""],
    stop_below: Int[Array, " shards"],
    length: int,
    mesh: AbstractDeviceMesh = OneDevice(),
    enough: Int[Array, ""] | int = 1,
) -> tuple[DecodeState, SegmentReport]:
    """Runs rounds with one draft length. DONATES the state.

    **Arguments:**

    - `max_rounds`: at most so many.
    - `stop_below`, `enough`: a segment need not go on when in so many shards no more rows than this are active.
    """

    def of_shard(context, state, max_rounds, stop_below, enough):
        (target, draft, verifier, sampling, eos_ids), store, loop = context

        def decode_once(state: DecodeState) -> DecodeState:
            return decode_round(target, draft, verifier, sampling, eos_ids, store, state, length)

        def goes_on(state: DecodeState) -> Bool[Array, ""]:
            stops = jnp.sum(state.active) <= stop_below[0]
            return mesh.total(stops.astype(jnp.int32)) < enough

        def totals(state: DecodeState):
            return state.accepted.sum(0), state.target_forwards.sum(), state.num_new.sum()

        before = totals(state)
        state, rounds = loop.run(decode_once, state, max_rounds, goes_on)
        after = totals(state)
        *sums, in_all = mesh.total((*jax.tree.map(jnp.subtract, after, before), after[2]))
        longest, broken = mesh.maximum((state.num_new.max(), (~state.finite).any().astype(jnp.int32)))
        return state, state.active, (broken == 0, rounds, *sums, in_all, longest)

    modules, store, loop = context
    state, active, numbers = mesh.by_shard(
        of_shard, ((WHOLE, ROWS, WHOLE), ROWS, WHOLE, ROWS, WHOLE), (ROWS, ROWS, WHOLE)
    )((modules, store, loop), state, max_rounds, stop_below, enough)
    return state, SegmentReport(active, *numbers)


class _Flight(NamedTuple):
    """A segment under way: when it began, how much had been compiled then, whether something is compiled beside it, and
    what its program took to compile beside others."""

    plan: SegmentPlan
    report: SegmentReport
    began: float
    compiled: float
    beside: bool
    behind: float


class SegmentQueue:
    """The segments that the device was given and the host has not looked at yet, oldest first."""

    def __init__(self, loop: AbstractSegmentLoop, compilations: CompileCounter, mesh: AbstractDeviceMesh):
        self._loop = loop
        self._mesh = mesh
        self._compilations = compilations
        self._flights: deque[_Flight] = deque()
        self._landed_at = 0.0
        self._longest = 0  # as the last look found it

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def is_full(self) -> bool:
        """Whether it is time to look at the oldest."""
        return len(self._flights) > self._loop.ahead

    @property
    def most_tokens(self) -> int:
        """The most tokens that a row may emit in them."""
        plans = [flight.plan for flight in self._flights]
        return sum(self._loop.most_rounds(plan.max_rounds) * (plan.length + 1) for plan in plans)

    def run(
        self,
        modules: Modules,
        store: AbstractPromptStore,
        state: DecodeState,
        plan: SegmentPlan,
        stop_below: Int[np.ndarray, " shards"],
        enough: int,
        *,
        beside: bool = False,
        behind: float = 0.0,
    ) -> DecodeState:
        """Gives the devices a segment, see `run_segment`. DONATES the state.

        **Arguments:**

        - `beside`: whether programs are compiled in another thread meanwhile.
        - `behind`: seconds that this segment's program took there.
        """
        began, compiled = time.perf_counter(), self._compilations.seconds
        max_rounds, shards = self._mesh.put((np.int32(plan.max_rounds), np.int32(enough)), WHOLE)
        below = self._mesh.put(stop_below.astype(np.int32), ROWS)
        context = (modules, store, self._loop)
        state, report = run_segment(context, state, max_rounds, below, plan.length, self._mesh, shards)
        for array in jax.tree.leaves(report):
            array.copy_to_host_async()
        self._flights.append(_Flight(plan, report, began, compiled, beside, behind))
        return state

    def look(self) -> tuple[SegmentReport, SegmentObservation]:
        """Waits for the oldest segment."""
        plan, report, began, compiled, beside, behind = self._flights.popleft()
        report = self._mesh.fetch(report)
        now = time.perf_counter()
        # One that was given while another ran has begun when that one was seen to end.
        seconds, self._landed_at = now - max(began, self._landed_at), now
        # Whoever decodes together has to choose alike.
        seconds, compiling = self._mesh.agreed(seconds, self._compilations.seconds - compiled)
        before, self._longest = self._longest, int(report.longest)
        observation = SegmentObservation(
            rows=len(report.active) // self._mesh.data,
            plan=plan,
            rounds=int(report.rounds),
            seconds=None if compiling > 0 or beside else seconds,
            accepted=tuple(report.accepted[: plan.length].tolist()),
            active_rounds=int(report.active_rounds),
            tokens=int(report.tokens),
            compile_seconds=compiling,
            behind_seconds=behind,
            elapsed=seconds,
            context=(before + self._longest) / 2,
        )
        return report, observation
