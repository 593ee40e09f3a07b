"""The decoder: prompts in, rollouts out. The device runs segments of rounds, the host looks in between."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Int, Key

from .._types import Prompts, Rollouts
from ..drafts import AbstractDraft, NoDraft
from ..errors import UserError
from ..models import AbstractLanguageModel, KVCache, caches_can_grow, default_cache_dtype, take_rows
from ..runtime import check_jax, count_compilations
from ..sampling import AbstractSampling, GreedySampling, Sampling
from ._block import Block
from ._buckets import bucket_for, default_smallest_bucket, shrink_below
from ._finite import require_finite
from ._greedy_match import GreedyMatch
from ._length import AbstractLengthController, FixedLength, SegmentObservation
from ._order import StartOrder
from ._output import Output
from ._prompts import AbstractPromptStore, PromptsInRows, PromptsOnce, share_prompts
from ._room import Room, RoomKeeper, grown, room_ladder, with_room
from ._segment import AbstractSegmentLoop, SegmentQueue, default_loop
from ._start import Modules, PromptState, prompt_pass, start_rows
from ._state import DecodeState
from ._stop import AbstractStop, NoStop, StopWatch
from ._verify import AbstractVerifier


class DecodeProgress(eqx.Module):
    """What a caller is told between segments.

    **Arguments:**

    - `active`: rows still being decoded.
    - `rows`: rows in all.
    - `tokens`: tokens emitted so far, over all rows.
    """

    active: int
    rows: int
    tokens: int


def decode(
    target: AbstractLanguageModel,
    prompts: Prompts | Sequence[Sequence[int]],
    *,
    draft: AbstractDraft | None = None,
    verifier: AbstractVerifier | None = None,
    length: AbstractLengthController | None = None,
    length_state: Any = None,
    sampling: AbstractSampling | None = None,
    key: Key[Array, ""],
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    stop: AbstractStop | None = None,
    samples: int = 1,
    max_rows: int | None = None,
    expected_lengths: Sequence[float] | None = None,
    smallest_bucket: int | None = None,
    cache_dtype: DTypeLike | None = None,
    loop: AbstractSegmentLoop | None = None,
    on_progress: Callable[[DecodeProgress], None] | None = None,
    on_segment: Callable[[SegmentObservation, Any], None] | None = None,
) -> Rollouts:
    """Generates completions, speculatively and without changing their distribution.

    Main arguments:

    - `target`: the language model. Decode with a copy whose matrices are in the dtype to compute in, see
        `models.cast_weights`.
    - `prompts`: token ids, of any lengths.
    - `draft`: what guesses; plain decoding by default.
    - `sampling`: temperature and truncation; temperature 1 by default.
    - `key`: a row's random numbers derive from this key, the row's index and the absolute position, and from nothing
        else; the same key gives the same rollouts (under an `AdaptiveLength`, whose choices follow the clock, the same
        tokens with the verifier `Coupled` alone).
    - `max_new_tokens`: the most tokens a row may emit. A row also stops where the model's context ends.
    - `eos_ids`: end-of-sequence ids; the one that ends a row is part of its completion.
    - `stop`: what else ends a row, such as `StopStrings(tokenizer, ("</answer>",))`; nothing by default.
    - `samples`: completions a prompt. Each prompt is prefilled once.

    Other arguments:

    - `verifier`: by default `Block`, or `GreedyMatch` under `GreedySampling`.
    - `length`: how many tokens to draft; by default 3 or the draft's most.
    - `length_state`: what a controller learned in an earlier call, see `on_segment`; by default it starts anew.
    - `max_rows`: decode at most so many rows at a time; as rows finish, waiting ones take their place. By default all.
    - `expected_lengths`: of the completions of each prompt, `nan` where nothing is known: then it is the mean of its
        rows that have ended. Rows that are expected to be longest start first, so that few are left at the end.
    - `smallest_bucket`: when rows finish, the batch is shrunk to the next power of two, but not below this; by
        default 2, on CPU 1 in float32, where a single row is cheaper, and 16 for a very small model. Each is a program
        to compile: for a single decoding 2 may be enough.
    - `cache_dtype`: of keys and values; by default float32 on CPU (where a bfloat16 write would convert the whole
        cache) and the dtype of the target's matrices elsewhere.
    - `loop`: how the device repeats rounds; by default [`eqx_specgrpo.decoding.UntilRowsFinish`][] on CPU and
        [`eqx_specgrpo.decoding.FixedRounds`][] elsewhere.
    - `on_progress`: called between segments.
    - `on_segment`: called after each segment with what was seen of it and the controller's new state.

    **Returns:**

    `Rollouts`, `samples` rows a prompt, rows of a prompt consecutive.

    **Raises:**

    [`eqx_specgrpo.decoding.NonFiniteLogits`][] if the model's or the draft's logits are not finite numbers, and
    `UserError` if a prompt does not fit the model.
    """
    check_jax()
    draft = NoDraft() if draft is None else draft
    sampling = Sampling() if sampling is None else sampling
    length = FixedLength(3) if length is None else length
    stop = NoStop() if stop is None else stop
    if verifier is None:
        verifier = GreedyMatch() if isinstance(sampling, GreedySampling) else Block()
    _check_modules(
        draft=(draft, AbstractDraft, "MedusaHeads.fresh(target.hidden_size, num_heads=3)"),
        sampling=(sampling, AbstractSampling, "Sampling(temperature=0.7)"),
        length=(length, AbstractLengthController, "FixedLength(3)"),
        verifier=(verifier, AbstractVerifier, "Block()"),
        stop=(stop, AbstractStop, 'StopStrings(tokenizer, ("</answer>",))'),
    )
    if isinstance(verifier, GreedyMatch) and not isinstance(sampling, GreedySampling):
        raise ValueError(
            "the verifier GreedyMatch keeps only the most likely tokens, which is not lossless under sampling: use "
            "sampling=GreedySampling(), or another verifier"
        )
    if not isinstance(prompts, Prompts):
        prompts = Prompts.from_lists(prompts)
    prompts = Prompts(np.asarray(prompts.tokens), np.asarray(prompts.lengths))
    if samples < 1 or max_new_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(
            f"samples ({samples}), max_new_tokens ({max_new_tokens}) and max_rows ({max_rows}) must be at least 1"
        )
    _check_prompts(target, prompts)
    draft.check(target)
    length_state = length.init(draft.max_length) if length_state is None else length_state

    modules = (target, draft, verifier, sampling, jnp.asarray(sorted(set(eos_ids)) or [-1], jnp.int32))
    num_rows = len(prompts.lengths) * samples
    block = draft.max_length + 1
    smallest_bucket = default_smallest_bucket(target) if smallest_bucket is None else smallest_bucket
    if cache_dtype is None:
        cache_dtype = default_cache_dtype(target)
    loop = default_loop(target) if loop is None else loop
    rooms = room_ladder(prompts.tokens.shape[1], max_new_tokens + block, can_grow=caches_can_grow(target))
    keeper = RoomKeeper(rooms, block, loop)
    at_once = num_rows if max_rows is None else min(max_rows, num_rows)
    waiting = StartOrder(expected_lengths, len(prompts.lengths), samples)
    output = Output(num_rows, max_new_tokens, draft.max_length)
    row_ids = waiting.take(at_once, output.lengths, output.ended)
    num_prompts, width = prompts.tokens.shape
    share = share_prompts(
        target, prompts=num_prompts, width=width, samples=samples, waiting=len(waiting), cache_dtype=cache_dtype
    )
    if share:
        row_ids = np.arange(num_rows)
    state, store, prompt_state = _prefill(
        modules,
        jnp.asarray(prompts.tokens),
        jnp.asarray(prompts.lengths),
        jnp.asarray(np.minimum(max_new_tokens, target.max_length - prompts.lengths), jnp.int32),
        key,
        jnp.asarray(row_ids),
        jnp.asarray(row_ids // samples),
        room=keeper.room,
        capacity=prompts.tokens.shape[1] + rooms[-1].new,
        cache_dtype=jnp.dtype(cache_dtype).name,
        share=share,
        keep_prompts=len(waiting) > 0,
    )

    def look(segments: SegmentQueue, length_state: Any) -> tuple[Bool[np.ndarray, " rows"], int, int, Any]:
        nonlocal state
        report, observation = segments.look()
        if not report.finite:
            require_finite(state, row_ids, samples)
        length_state = length.update(length_state, observation)
        if on_segment is not None:
            on_segment(observation, length_state)
        cut = watch.look(row_ids, state)
        if cut is not state:
            state = cut
            return *_standing(state), length_state
        return np.asarray(report.active), int(report.tokens_in_all), int(report.longest), length_state

    require_finite(state, row_ids, samples)
    watch = StopWatch(stop, num_rows)
    state = watch.look(row_ids, state)
    active, emitted, longest = _standing(state)
    with count_compilations() as compilations:
        segments = SegmentQueue(loop, compilations)
        while True:
            if on_progress is not None:
                done = output.tokens_of_others(row_ids)
                on_progress(DecodeProgress(int(active.sum()), num_rows, done + emitted))
            admission = _admission(len(row_ids), len(waiting))
            admits = admission > 0 and int((~active).sum()) >= admission
            bucket = bucket_for(int(active.sum()), smallest_bucket)
            shrinks = admission == 0 and bucket < len(row_ids)
            if len(segments) > 0 and (admits or shrinks or not active.any()):
                # Rows are moved when nothing is under way, by what is true then.
                active, emitted, longest, length_state = look(segments, length_state)
                continue
            if admits:
                assert prompt_state is not None
                output.take(row_ids, state)
                slots = np.flatnonzero(~active)[:admission]
                admitted = waiting.take(admission, output.lengths, output.ended)
                row_ids = row_ids.copy()
                row_ids[slots] = admitted
                which = (jnp.asarray(slots), jnp.asarray(admitted), jnp.asarray(admitted // samples))
                state = _admit((modules, prompt_state, key, *which), state, keeper.room)
                require_finite(state, row_ids, samples)
                state = watch.look(row_ids, state)
                active, emitted, longest = _standing(state)
                continue
            if not active.any():
                output.take(row_ids, state)
                break
            if shrinks:
                output.take(row_ids, state)
                # Active rows first; finished ones only fill the bucket up.
                keep = np.argsort(~active, kind="stable")[:bucket]
                row_ids = row_ids[keep]
                # Waited for: else the copy would count as part of the next segment, and a small batch look dear.
                state = jax.block_until_ready(_take_rows(state, store, jnp.asarray(keep), keeper.room.whole))
                store = PromptsInRows()
                active, emitted = active[keep], int(output.lengths[row_ids].sum())
                longest = int(output.lengths[row_ids].max())
            plan = length.choose(length_state, len(row_ids))
            if not 0 <= plan.length <= draft.max_length:
                raise ValueError(
                    f"{type(length).__name__} planned to draft {plan.length} tokens, but this draft drafts at most "
                    f"{draft.max_length}: was the length_state made for another draft?"
                )
            if stop.most_rounds is not None:
                plan = dataclasses.replace(plan, max_rounds=min(plan.max_rounds, stop.most_rounds))
            fitting = keeper.fit(plan, longest + segments.most_tokens)
            if fitting is None and len(segments) > 0:
                # What they may emit is more than they will.
                active, emitted, longest, length_state = look(segments, length_state)
                continue
            if fitting is None:
                keeper.grow(plan, longest)
                state = grown(draft, state, keeper.room, store.slots(*keeper.room))
                continue
            stop_below = len(row_ids) - admission if admission else shrink_below(len(row_ids), smallest_bucket)
            state = segments.run(modules, store, state, fitting, stop_below)
            if segments.is_full:
                active, emitted, longest, length_state = look(segments, length_state)
    return output.rollouts(prompts, samples)


def _standing(state: DecodeState) -> tuple[Bool[np.ndarray, " rows"], int, int]:
    """Which rows are active, and how many tokens they have emitted, together and the longest of them."""
    num_new = np.asarray(state.num_new)
    return np.asarray(state.active), int(num_new.sum()), int(num_new.max())


def _admission(rows: int, waiting: int) -> int:
    """How many waiting rows are admitted at once, when so many places are free: a power of two, so that few programs
    are compiled, and about a quarter of the rows, so that the device is not stopped for each."""
    most = min(max(1, rows // 4), waiting)
    return 1 << (most.bit_length() - 1) if most else 0


def _check_modules(**modules: tuple[Any, type, str]) -> None:
    for name, (value, kind, example) in modules.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}, but must be an {kind.__name__}, as in {name}={example}")


def _check_prompts(target: AbstractLanguageModel, prompts: Prompts) -> None:
    counts = np.arange(prompts.tokens.shape[1])[None] < prompts.lengths[:, None]
    unknown = counts & ((prompts.tokens < 0) | (prompts.tokens >= target.vocab_size))
    if unknown.any():
        row, place = np.argwhere(unknown)[0]
        raise ValueError(
            f"token {place} of prompt {row} is {prompts.tokens[row, place]}, but the model's vocabulary has "
            f"{target.vocab_size} tokens: was it made by another model's tokenizer?"
        )
    longest = int(np.argmax(prompts.lengths))
    if prompts.lengths[longest] >= target.max_length:
        raise UserError(
            f"prompt {longest} has {prompts.lengths[longest]} tokens, but the model's context holds "
            f"{target.max_length}, completion included: shorten the prompt or use a model with a longer context"
        )


@eqx.filter_jit
def _prefill(
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
) -> tuple[DecodeState, AbstractPromptStore, PromptState | None]:
    """The prompts' pass and the first rows; for rows that have to wait, the prompts are kept."""
    dtype = jnp.dtype(cache_dtype)
    prompt_state = prompt_pass(
        modules[0], modules[1], tokens, lengths, limits, room.new, room.whole, capacity, dtype, share=share
    )
    if share:
        store = PromptsOnce(cast(tuple[KVCache, ...], prompt_state.cache), lengths)
        cache = modules[0].init_cache(len(row_ids), room.new, dtype)
    else:
        store = PromptsInRows()
        cache = take_rows(prompt_state.cache, prompt_of_row)
    state = start_rows(modules, prompt_state, key, row_ids, prompt_of_row, cache)
    return state, store, prompt_state if keep_prompts else None


@eqx.filter_jit(donate="all-except-first")
def _admit(
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
) -> DecodeState:
    """Starts waiting rows in the places of finished ones. DONATES the state."""
    modules, prompt_state, key, slots, row_ids, prompt_of_row = context
    cache = take_rows(prompt_state.cache, prompt_of_row)
    fresh = start_rows(modules, prompt_state, key, row_ids, prompt_of_row, cache)
    if room.new > fresh.tokens.shape[1]:
        fresh = with_room(modules[1], fresh, room, room.whole)
    return jax.tree.map(lambda old, new: old.at[slots].set(new), state, fresh)


@eqx.filter_jit
def _take_rows(state: DecodeState, store: AbstractPromptStore, rows: Int[Array, " kept"], slots: int) -> DecodeState:
    """The state of some rows, whose caches then begin with their prompts."""
    cache = store.take(state.cache, rows, slots)
    others = jax.tree.map(lambda x: x[rows], dataclasses.replace(state, cache=()))
    return dataclasses.replace(others, cache=cache)
