"""The programs between segments: rows begin, are let in, and are left out. Each shard's are its own: no row moves."""

import dataclasses
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from ..layout import ROWS, WHOLE, AbstractDeviceMesh, OneDevice
from ..models import KVCache, take_rows
from ._prompts import AbstractPromptStore, PromptsInRows, PromptsOnce
from ._room import Room, with_room
from ._start import Modules, PromptState, prompt_pass, start_rows
from ._state import DecodeState


@eqx.filter_jit
def prefill(
    modules: Modules,
    tokens: Int[Array, "prompts seq"],
    lengths: Int[Array, " prompts"],
    limits: Int[Array, " prompts"],
    key: Key[Array, ""],
    row_ids: Int[Array, " rows"],
    prompt_of_row: Int[Array, " rows"],
    *,
    room: Room,
    capacity: int,
    cache_dtype: str,
    share: bool,
    keep_prompts: bool,
    prompt_slots: int | None = None,
    mesh: AbstractDeviceMesh = OneDevice(),
) -> tuple[DecodeState, AbstractPromptStore, PromptState | None]:
    """The prompts' pass and the first rows; for rows that have to wait, the prompts are kept.

    **Arguments:**

    - `row_ids`: that random numbers derive from.
    - `prompt_of_row`: counted from the first prompt of the row's shard.
    - `prompt_slots`: of a cache that holds prompts alone; by default as many as they are padded to.
    """
    dtype = jnp.dtype(cache_dtype)

    def of_shard(modules, key, tokens, lengths, limits, row_ids, prompt_of_row):
        slots = (prompt_slots or tokens.shape[1]) if share else room.whole
        prompt_state = prompt_pass(
            modules[0], modules[1], tokens, lengths, limits, room.new, room.whole, slots, capacity, dtype
        )
        if share:
            store = PromptsOnce(cast(tuple[KVCache, ...], prompt_state.cache), lengths)
            cache = modules[0].init_cache(len(row_ids), room.new, dtype)
        else:
            store = PromptsInRows()
            cache = take_rows(prompt_state.cache, prompt_of_row)
        state = start_rows(modules, prompt_state, key, row_ids, prompt_of_row, cache)
        return state, store, prompt_state if keep_prompts else None

    return mesh.by_shard(of_shard, (WHOLE, WHOLE, ROWS, ROWS, ROWS, ROWS, ROWS), ROWS)(
        modules, key, tokens, lengths, limits, row_ids, prompt_of_row
    )


@eqx.filter_jit(donate="all-except-first")
def admit(
    context: tuple[
        Modules,
        PromptState,
        Key[Array, ""],
        Int[Array, " admitted"],
        Int[Array, " admitted"],
        Int[Array, " admitted"],
    ],
    state: DecodeState,
    room: Room,
    mesh: AbstractDeviceMesh = OneDevice(),
) -> DecodeState:
    """Starts waiting rows in the places of finished ones. DONATES the state.

    **Arguments:**

    - `context`: the modules, the prompts and the key; then the places, the ids that random numbers derive from, and the
        prompts of the rows. Places and prompts are counted within the shard; at a place beyond its last, nothing is
        started.
    """

    def of_shard(modules, key, prompt_state, slots, row_ids, prompt_of_row, state):
        cache = take_rows(prompt_state.cache, prompt_of_row)
        fresh = start_rows(modules, prompt_state, key, row_ids, prompt_of_row, cache)
        if room.new > fresh.tokens.shape[1]:
            fresh = with_room(modules[1], fresh, room, room.whole)
        return jax.tree.map(lambda old, new: old.at[slots].set(new, mode="drop"), state, fresh)

    modules, prompt_state, key, slots, row_ids, prompt_of_row = context
    return mesh.by_shard(of_shard, (WHOLE, WHOLE, ROWS, ROWS, ROWS, ROWS, ROWS), ROWS)(
        modules, key, prompt_state, slots, row_ids, prompt_of_row, state
    )


@eqx.filter_jit
def keep_rows(
    state: DecodeState,
    store: AbstractPromptStore,
    rows: Int[Array, " kept"],
    slots: int,
    mesh: AbstractDeviceMesh = OneDevice(),
) -> DecodeState:
    """The state of some rows, whose caches then begin with their prompts.

    **Arguments:**

    - `rows`: places, counted within the shard; as many for each.
    - `slots`: of a cache that begins with its prompt.
    """

    def of_shard(state, store, rows):
        cache = store.take(state.cache, rows, slots)
        others = jax.tree.map(lambda x: x[rows], dataclasses.replace(state, cache=()))
        return dataclasses.replace(others, cache=cache)

    return mesh.by_shard(of_shard, (ROWS, ROWS, ROWS), ROWS)(state, store, rows)
