"""The decoder: prompts in, rollouts out. The device runs segments of rounds, the host looks in between."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Key

from .._types import Prompts, Rollouts
from ..drafts import AbstractDraft, NoDraft
from ..errors import UserError
from ..layout import ROWS, WHOLE, AbstractDeviceMesh, Layout, OneDevice
from ..models import AbstractLanguageModel, default_cache_dtype
from ..runtime import check_jax, count_compilations
from ..sampling import AbstractSampling, GreedySampling, Sampling
from ._ahead import WHILE_WAITING, SegmentPrograms
from ._block import Block
from ._buckets import bucket_for, default_smallest_bucket, shrink_below
from ._compiler import AbstractCompiler, CompileAtOnce
from ._finite import require_finite
from ._greedy_match import GreedyMatch
from ._length import AbstractLengthController, FixedLength, SegmentObservation
from ._output import Output
from ._prompts import PromptsInRows, share_prompts
from ._room import RoomKeeper, grown, rooms_for
from ._row_programs import admit, keep_rows, prefill
from ._segment import AbstractSegmentLoop, SegmentQueue, default_loop
from ._shards import Admission, Division, ShardQueues
from ._state import DecodeState
from ._stop import AbstractStop, NoStop, StopWatch
from ._verify import AbstractVerifier


class DecodeProgress(eqx.Module):
    """The progress of a decoding, which a caller gets between segments.

    **Arguments:**

    - `active`: number of rows that are still being decoded.
    - `rows`: number of rows in all.
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
    mesh: AbstractDeviceMesh | None = None,
    first_row: int = 0,
    compiler: AbstractCompiler | None = None,
    on_progress: Callable[[DecodeProgress], None] | None = None,
    on_segment: Callable[[SegmentObservation, Any], None] | None = None,
) -> Rollouts:
    """Generates completions, speculatively and without changing their distribution.

    Main arguments:

    - `target`: the language model. Decode with a copy whose matrices are in the dtype to compute in, see
        `models.cast_weights`.
    - `prompts`: token ids, of any lengths.
    - `draft`: the draft; plain decoding by default.
    - `sampling`: temperature and truncation; temperature 1 by default.
    - `key`: a row's random numbers derive from this key, the row's index and the absolute position, and from nothing
        else; the same key gives the same rollouts (under an `AdaptiveLength`, whose choices follow the clock, the same
        tokens with the verifier `Coupled` alone).
    - `max_new_tokens`: the most tokens a row may emit. A row also stops where the model's context ends.
    - `eos_ids`: end-of-sequence ids; the one that ends a row is part of its completion.
    - `stop`: a further condition that ends a row, such as `StopStrings(tokenizer, ("</answer>",))`; nothing by default.
    - `samples`: number of completions per prompt. Each prompt is prefilled once.

    Other arguments:

    - `verifier`: by default `Block`, or `GreedyMatch` under `GreedySampling`.
    - `length`: the length controller; by default always 3 tokens, or the draft's most if that is smaller.
    - `length_state`: what a controller learned in an earlier call, see `on_segment`; by default it starts anew.
    - `max_rows`: decode at most so many rows at a time, but one in each shard of the mesh; as rows finish, waiting ones
        take their place. By default all.
    - `expected_lengths`: of the completions of each prompt, `nan` where nothing is known: then it is the mean of its
        rows that have ended. Rows that are expected to be longest start first, so that few are left at the end.
    - `smallest_bucket`: when rows finish, the batch (on a mesh that of each shard, alike) is shrunk to the next power
        of two, but not below this; by default 2, on CPU 1 in float32, where a single row is cheaper, and 16 for a very
        small model. Each is a program to compile: for a single decoding 2 may be enough.
    - `cache_dtype`: of keys and values; by default float32 on CPU (where a bfloat16 write would convert the whole
        cache) and the dtype of the target's matrices elsewhere.
    - `loop`: how the device repeats rounds; by default [`eqx_specgrpo.decoding.UntilRowsFinish`][] on CPU and
        [`eqx_specgrpo.decoding.FixedRounds`][] elsewhere.
    - `mesh`: the devices to decode on, see [`eqx_specgrpo.layout.make_mesh`][]; by default the one that JAX computes
        on. Prompts, with all their rows, are divided over its axis `data`; weights that are not there yet are copied.
        On devices of several processes all of these make the same call, and each gets all rollouts.
    - `first_row`: what the first row's index is counted from, where the rows are some of a larger decoding: of those
        that other processes have.
    - `compiler`: what compiles programs of smaller batches and of other draft lengths; by default
        [`eqx_specgrpo.decoding.CompileAtOnce`][]. Under [`eqx_specgrpo.decoding.CompileBehind`][] decoding goes on
        without them until they are there, and [`eqx_specgrpo.decoding.CompileSparingly`][] compiles less.
    - `on_progress`: called between segments.
    - `on_segment`: called after each segment with its counts and times and the controller's new state.

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
    mesh = OneDevice() if mesh is None else mesh
    if verifier is None:
        verifier = GreedyMatch() if isinstance(sampling, GreedySampling) else Block()
    _check_modules(
        draft=(draft, AbstractDraft, "MedusaHeads.fresh(target.hidden_size, num_heads=3)"),
        sampling=(sampling, AbstractSampling, "Sampling(temperature=0.7)"),
        length=(length, AbstractLengthController, "FixedLength(3)"),
        verifier=(verifier, AbstractVerifier, "Block()"),
        stop=(stop, AbstractStop, 'StopStrings(tokenizer, ("</answer>",))'),
        mesh=(mesh, AbstractDeviceMesh, "make_mesh()"),
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

    eos = np.asarray(sorted(set(eos_ids)) or [-1], np.int32)
    target, draft = mesh.lay_out((target, draft), Layout.COPY)
    modules = (target, draft, *mesh.put((verifier, sampling, eos), WHOLE))
    key = mesh.put(key, WHOLE)
    num_rows = len(prompts.lengths) * samples
    block = draft.max_length + 1
    smallest_bucket = default_smallest_bucket(target) if smallest_bucket is None else smallest_bucket
    if cache_dtype is None:
        cache_dtype = default_cache_dtype(target)
    loop = default_loop(target) if loop is None else loop
    programs = SegmentPrograms(CompileAtOnce() if compiler is None else compiler, modules, loop, mesh, draft.max_length)
    division = Division(mesh.data, len(prompts.lengths), samples)
    waiting = ShardQueues(division, expected_lengths, len(prompts.lengths), samples)
    output = Output(division.with_fillers, max_new_tokens, draft.max_length, mesh)
    row_ids = waiting.first(max_rows, output.lengths, output.ended).reshape(-1)
    width, rooms = rooms_for(
        target,
        rows=len(row_ids) // mesh.data,
        width=prompts.tokens.shape[1],
        most=max_new_tokens + block,
        cache_dtype=cache_dtype,
    )
    keeper = RoomKeeper(rooms, block, loop)
    share = share_prompts(
        target,
        prompts=division.prompts_a_shard,
        width=width,
        samples=samples,
        waiting=int(waiting.waiting.sum()),
        cache_dtype=cache_dtype,
    )
    if share:
        row_ids = division.row_ids.reshape(-1)
    limits = np.minimum(max_new_tokens, target.max_length - prompts.lengths)
    tokens, lengths, limits = mesh.put(division.filled(prompts, limits), ROWS)
    keyed, prompt_of_row = mesh.put(((row_ids + first_row).astype(np.int32), division.prompt_of(row_ids)), ROWS)
    state, store, prompt_state = prefill(
        modules,
        tokens,
        lengths,
        limits,
        key,
        keyed,
        prompt_of_row,
        room=keeper.room,
        prompt_slots=width,
        capacity=width + rooms[-1].new,
        cache_dtype=jnp.dtype(cache_dtype).name,
        share=share,
        keep_prompts=bool(waiting.waiting.any()),
        mesh=mesh,
    )

    def look(segments: SegmentQueue, length_state: Any) -> tuple[Bool[np.ndarray, " rows"], int, int, Any]:
        nonlocal state
        report, observation = segments.look()
        if not report.finite:
            require_finite(mesh, state, row_ids, samples)
        length_state = length.update(length_state, observation)
        if on_segment is not None:
            on_segment(observation, length_state)
        cut = watch.look(row_ids, state)
        if cut is not state:
            state = cut
            return *_standing(mesh, state), length_state
        return np.asarray(report.active), int(report.tokens_in_all), int(report.longest), length_state

    require_finite(mesh, state, row_ids, samples)
    watch = StopWatch(stop, division.with_fillers, mesh)
    state = watch.look(row_ids, state)
    active, emitted, longest = _standing(mesh, state)
    with count_compilations() as compilations:
        segments = SegmentQueue(loop, compilations, mesh)
        while True:
            if on_progress is not None:
                done = output.tokens_of_others(row_ids)
                on_progress(DecodeProgress(int(active.sum()), num_rows, done + emitted))
            of_shard = active.reshape(mesh.data, -1)
            rows = of_shard.shape[1]
            admission = Admission(rows, waiting.waiting)
            admits = admission.is_due(of_shard)
            # All shards have as many rows: as many as the fullest needs.
            needed = bucket = bucket_for(int(of_shard.sum(1).max()), smallest_bucket)
            half, first = shrink_below(rows, smallest_bucket), 0
            if admission.size == 0 and 0 < active.sum() < len(row_ids):
                first = length.choose(length_state, min(half, bucket), longest).length if half else first
                bucket = programs.shrunk_to(state, store, rows, bucket, half, keeper.room.whole, first)
            shrinks = admission.size == 0 and bucket < rows
            if len(segments) > 0 and (admits or shrinks or not active.any()):
                # Rows are moved when nothing is under way, by what is true then.
                active, emitted, longest, length_state = look(segments, length_state)
                continue
            if admits:
                assert prompt_state is not None
                output.take(row_ids, state)
                row_ids = row_ids.copy()
                admitted = waiting.take(admission.counts(of_shard), output.lengths, output.ended)
                which = np.zeros((3, mesh.data, admission.size), np.int32)
                which[0] = rows  # beyond the last: there, nothing is started
                for shard, ids in enumerate(admitted):
                    slots = np.flatnonzero(~of_shard[shard])[: len(ids)]
                    row_ids[shard * rows + slots] = ids
                    which[:, shard, : len(ids)] = slots, ids + first_row, division.prompt_of(ids)
                context = (modules, prompt_state, key, *mesh.put(tuple(which.reshape(3, -1)), ROWS))
                state = admit(context, state, keeper.room, mesh)
                require_finite(mesh, state, row_ids, samples)
                state = watch.look(row_ids, state)
                active, emitted, longest = _standing(mesh, state)
                continue
            if not active.any():
                output.take(row_ids, state)
                break
            if shrinks:
                output.take(row_ids, state)
                # Active rows first; finished ones only fill the bucket up.
                keep = np.argsort(~of_shard, axis=1, kind="stable")[:, :bucket]
                kept = (keep + rows * np.arange(mesh.data)[:, None]).reshape(-1)
                row_ids = row_ids[kept]
                # Waited for: else the copy would count as part of the next segment, and a small batch look dear.
                places = mesh.put(keep.reshape(-1).astype(np.int32), ROWS)
                state = jax.block_until_ready(keep_rows(state, store, places, keeper.room.whole, mesh))
                store, rows = PromptsInRows(), bucket
                programs.shrunk(state, store, first)
                active, emitted = active[kept], int(output.lengths[row_ids].sum())
                longest = int(output.lengths[row_ids].max())
            plan = length.choose(length_state, rows, longest)
            if not 0 <= plan.length <= draft.max_length:
                raise ValueError(
                    f"{type(length).__name__} planned to draft {plan.length} tokens, but this draft drafts at most "
                    f"{draft.max_length}: was the length_state made for another draft?"
                )
            plan = programs.ready_plan(plan, state, store)
            waits = admission.size == 0 and needed < rows  # for the programs of a smaller batch
            if waits:
                plan = dataclasses.replace(plan, max_rounds=min(plan.max_rounds, WHILE_WAITING))
            if stop.most_rounds is not None:
                plan = dataclasses.replace(plan, max_rounds=min(plan.max_rounds, stop.most_rounds))
            fitting = keeper.fit(plan, longest + segments.most_tokens)
            if fitting is None and len(segments) > 0:
                # What they may emit is more than they will.
                active, emitted, longest, length_state = look(segments, length_state)
                continue
            if fitting is None:
                keeper.grow(plan, longest)
                state = grown(draft, state, keeper.room, store.slots(*keeper.room), mesh)
                continue
            if admission.size > 0:
                stop_below, enough = admission.stop_below, 1
            else:
                stop_below, enough = np.full(mesh.data, shrink_below(rows, smallest_bucket)), mesh.data
            if waits:
                stop_below = np.zeros_like(stop_below)
            state = segments.run(
                modules,
                store,
                state,
                fitting,
                stop_below,
                enough,
                beside=programs.is_busy,
                behind=programs.compiled_behind(state, store, fitting.length),
            )
            programs.ran(state, store, fitting.length)
            if segments.is_full:
                active, emitted, longest, length_state = look(segments, length_state)
    return output.rollouts(prompts, samples)


def _standing(mesh: AbstractDeviceMesh, state: DecodeState) -> tuple[Bool[np.ndarray, " rows"], int, int]:
    """Which rows are active, and how many tokens they have emitted, together and the longest of them."""
    num_new, active = mesh.fetch((state.num_new, state.active))
    return active, int(num_new.sum()), int(num_new.max())


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
