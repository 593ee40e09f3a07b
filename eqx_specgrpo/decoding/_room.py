"""How much room rows and their prompts have: few sizes, since each is a set of programs, and where room is dear what
rows have come to asks for, and not what they may become."""

import dataclasses
from typing import NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike

from ..drafts import AbstractDraft
from ..layout import ROWS, WHOLE, AbstractDeviceMesh, OneDevice
from ..models import AbstractLanguageModel, KVCache, caches_can_grow, platform_of
from ._length import SegmentPlan
from ._segment import AbstractSegmentLoop
from ._state import DecodeState

# New tokens that there is room for at first. What may not become a quarter longer has all its room at once.
_SMALLEST = 512
# Slots of a cache that is not the longest come in so many: it is then read in the same pieces as the longest one, and
# sums are rounded alike.
_SLOTS = 128
# Caches of a shard that take no more bytes are small.
_CHEAP = 2 << 30
# A segment of fewer rounds is not worth a look of the host: rather grow.
_FEWEST_ROUNDS = 8


class Room(NamedTuple):
    """Sizes of a row's arrays.

    **Arguments:**

    - `new`: positions behind the prompt: of the buffers, and of the cache where prompts are stored once.
    - `whole`: slots of a cache that begins with the prompt.
    """

    new: int
    whole: int


def room_ladder(width: int, most: int, *, can_grow: bool = True, smallest: int | None = None) -> tuple[Room, ...]:
    """The rooms that rows go through.

    A step doubles what is filled when less than `smallest / 4` are free: then at most twice as many slots are read as
    are filled.

    **Arguments:**

    - `width`: of the padded prompts.
    - `most`: new tokens of the longest row, and a block.
    - `can_grow`: whether there is more than the last.
    - `smallest`: new tokens of the first; by default 512.
    """
    smallest = _SMALLEST if smallest is None else smallest
    rooms, new = [], smallest
    while can_grow and most > 5 * smallest // 4 and new < most:
        rooms.append(Room(new, -(-(width + new) // _SLOTS) * _SLOTS))
        new = 2 * (new - smallest // 4)
    # Not fewer slots than those before, which were rounded up.
    return (*rooms, Room(most, max(width + most, rooms[-1].whole if rooms else 0)))


def rooms_for(
    target: AbstractLanguageModel, *, rows: int, width: int, most: int, cache_dtype: DTypeLike
) -> tuple[int, tuple[Room, ...]]:
    """How many slots of a cache padded prompts have, and the rooms of `room_ladder` behind them.

    Each is a set of programs. So on a CPU, where slots that are not filled cost nothing but memory, small caches have
    128, 1,024, 8,192 and so on slots for prompts, or as many as needed up to 64, and one room.

    **Arguments:**

    - `rows`: of a shard.
    - `width`: of the padded prompts.
    - `most`: new tokens of the longest row, and a block.
    """
    if not caches_can_grow(target):
        return width, room_ladder(width, most, can_grow=False)
    slots = width
    if width > 64:
        slots = _SLOTS
        while slots < width:
            slots *= 8
    caches = eqx.filter_eval_shape(target.init_cache, rows, slots + most, cache_dtype)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    if platform_of(target) == "cpu" and size <= _CHEAP:
        return slots, room_ladder(slots, most, can_grow=False)
    return width, room_ladder(width, most)


class RoomKeeper:
    """The room that rows have now, and whether a segment fits in it.

    **Arguments:**

    - `rooms`: see `room_ladder`.
    - `block`: tokens that the longest round writes.
    - `loop`: what runs the segments.
    """

    def __init__(self, rooms: tuple[Room, ...], block: int, loop: AbstractSegmentLoop):
        self._rooms = rooms
        self._rung = 0
        self._block = block
        self._loop = loop

    @property
    def room(self) -> Room:
        return self._rooms[self._rung]

    def fit(self, plan: SegmentPlan, reach: int) -> SegmentPlan | None:
        """The plan with as many rounds as fit, or `None` if these are too few.

        **Arguments:**

        - `reach`: the most tokens that a row will have emitted when the segment begins.
        """
        if self._rung == len(self._rooms) - 1:
            return plan  # here rows end by their own limits
        rounds = max((self.room.new - self._block - reach) // (plan.length + 1), 0)
        asked = min(plan.max_rounds, rounds)
        if asked < min(plan.max_rounds, _FEWEST_ROUNDS) or self._loop.most_rounds(asked) > rounds:
            return None
        return dataclasses.replace(plan, max_rounds=asked)

    def grow(self, plan: SegmentPlan, longest: int) -> None:
        """Goes to the first room in which the segment fits."""
        while self.fit(plan, longest) is None:
            self._rung += 1


def with_room(draft: AbstractDraft, state: DecodeState, room: Room, slots: int) -> DecodeState:
    """The state with at least this much room, or as it is.

    **Arguments:**

    - `slots`: of the rows' own caches.
    """
    cache = tuple(_layer_with_slots(layer, slots) for layer in cast(tuple[KVCache, ...], state.cache))
    return dataclasses.replace(_others_with_room(draft, dataclasses.replace(state, cache=()), room), cache=cache)


def grown(
    draft: AbstractDraft, state: DecodeState, room: Room, slots: int, mesh: AbstractDeviceMesh = OneDevice()
) -> DecodeState:
    """As `with_room`, a layer at a time: only one of them is there twice. DELETES what it replaces of the caches.

    (A donated array of another size is of no use to XLA, and one program for all layers would need all of them twice.)
    """
    cache = []
    for layer in cast(tuple[KVCache, ...], state.cache):
        if layer.values.shape[2] == slots:
            cache.append(layer)
            continue
        cache.append(jax.block_until_ready(_grow_layer(layer, slots, mesh)))
        for array in jax.tree.leaves(layer):
            array.delete()
    others = _grow_others(draft, dataclasses.replace(state, cache=()), room, mesh)
    return jax.block_until_ready(dataclasses.replace(others, cache=tuple(cache)))


def _layer_with_slots(layer: KVCache, slots: int) -> KVCache:
    return layer.with_slots(slots)


def _others_with_room(draft: AbstractDraft, state: DecodeState, room: Room) -> DecodeState:
    more = room.new - state.tokens.shape[1]

    def buffer(values: Array) -> Array:
        return jnp.pad(values, [(0, 0), (0, more), *[(0, 0)] * (values.ndim - 2)])

    return dataclasses.replace(
        state,
        tokens=buffer(state.tokens),
        logprobs=buffer(state.logprobs),
        support=jax.tree.map(buffer, state.support),
        draft=draft.grow(state.draft, room.whole),
    )


@eqx.filter_jit
def _grow_layer(layer: KVCache, slots: int, mesh: AbstractDeviceMesh) -> KVCache:
    return mesh.by_shard(_layer_with_slots, (ROWS, WHOLE), ROWS)(layer, slots)


@eqx.filter_jit
def _grow_others(draft: AbstractDraft, state: DecodeState, room: Room, mesh: AbstractDeviceMesh) -> DecodeState:
    return mesh.by_shard(_others_with_room, (WHOLE, ROWS, WHOLE), ROWS)(draft, state, room)
