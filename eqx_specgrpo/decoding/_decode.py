"""The decoder: prompts in, rollouts out. The device runs segments of rounds, the host looks in between."""

import time
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int, Key

from .._errors import UserError
from .._sampling import AbstractSampling, GreedySampling, Sampling
from .._types import DecodeStatistics, Prompts, Rollouts, StopReason
from ..drafts import AbstractDraft, NoDraft, Proposal
from ..models import AbstractLanguageModel, take_rows
from ._length import AbstractLengthController, FixedLength, SegmentObservation
from ._round import decode_round
from ._state import DecodeState, commit
from ._verify import AbstractVerifier, GreedyMatch, Rejection

_ROUNDS_PER_SEGMENT = 64


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
    sampling: AbstractSampling | None = None,
    key: Key[Array, ""],
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    samples: int = 1,
    smallest_bucket: int = 4,
    cache_dtype: DTypeLike | None = None,
    on_progress: Callable[[DecodeProgress], None] | None = None,
) -> Rollouts:
    """Generates completions, speculatively and without changing their distribution.

    Main arguments:

    - `target`: the language model. Decode with a copy whose matrices are in the dtype to compute in, see
        `models.cast_weights`.
    - `prompts`: token ids, of any lengths.
    - `draft`: what guesses; plain decoding by default.
    - `sampling`: temperature and truncation; temperature 1 by default.
    - `key`: a row's random numbers derive from this key, the row's index and the absolute position, and from nothing
        else; the same key gives the same rollouts.
    - `max_new_tokens`: the most tokens a row may emit. A row also stops where the model's context ends.
    - `eos_ids`: end-of-sequence ids; the one that ends a row is part of its completion.
    - `samples`: completions a prompt. Each prompt is prefilled once.

    Other arguments:

    - `verifier`: by default `Rejection`, or `GreedyMatch` under `GreedySampling`.
    - `length`: how many tokens to draft; by default 3 or the draft's most.
    - `smallest_bucket`: when rows finish, the batch is shrunk to the next power of two, but not below this.
    - `cache_dtype`: of keys and values; by default float32 on CPU (where a bfloat16 write would convert the whole
        cache) and bfloat16 elsewhere.
    - `on_progress`: called between segments.

    **Returns:**

    `Rollouts`, `samples` rows a prompt, rows of a prompt consecutive.
    """
    draft = NoDraft() if draft is None else draft
    sampling = Sampling() if sampling is None else sampling
    length = FixedLength(3) if length is None else length
    if verifier is None:
        verifier = GreedyMatch() if isinstance(sampling, GreedySampling) else Rejection()
    if isinstance(verifier, GreedyMatch) and not isinstance(sampling, GreedySampling):
        raise ValueError(
            "the verifier GreedyMatch keeps only the most likely tokens, which is not lossless under sampling: use "
            "sampling=GreedySampling(), or another verifier"
        )
    if not isinstance(prompts, Prompts):
        prompts = Prompts.from_lists(prompts)
    prompts = Prompts(np.asarray(prompts.tokens), np.asarray(prompts.lengths))
    if samples < 1 or max_new_tokens < 1:
        raise ValueError(f"samples ({samples}) and max_new_tokens ({max_new_tokens}) must be at least 1")
    _check_lengths(target, prompts)
    draft.check(target)
    length_state = length.init(draft.max_length)

    num_rows = len(prompts.lengths) * samples
    width = prompts.tokens.shape[1]
    block = draft.max_length + 1
    if cache_dtype is None:
        cache_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    eos = jnp.asarray(sorted(set(eos_ids)) or [-1], jnp.int32)
    state = _prefill(
        (target, draft, verifier, sampling),
        jnp.asarray(prompts.tokens),
        jnp.asarray(prompts.lengths),
        jnp.asarray(np.minimum(max_new_tokens, target.max_length - prompts.lengths), jnp.int32),
        eos,
        key,
        samples=samples,
        new=max_new_tokens + block,
        capacity=width + max_new_tokens + block,
        cache_dtype=jnp.dtype(cache_dtype).name,
    )
    output = _Output(num_rows, max_new_tokens, draft.max_length)
    row_ids = np.arange(num_rows)
    seen: set[tuple[int, int]] = set()
    while True:
        active = np.asarray(state.active)
        if on_progress is not None:
            done = output.tokens_of_others(row_ids)
            on_progress(DecodeProgress(int(active.sum()), num_rows, done + int(np.asarray(state.num_new).sum())))
        if not active.any():
            output.take(row_ids, state)
            break
        bucket = _bucket(int(active.sum()), smallest_bucket)
        if bucket < len(row_ids):
            output.take(row_ids, state)
            # Active rows first; finished ones only fill the bucket up.
            keep = np.argsort(~active, kind="stable")[:bucket]
            row_ids = row_ids[keep]
            state = _take_rows(state, jnp.asarray(keep))
        num_draft = length.choose(length_state, len(row_ids))
        stop_below = _shrink_below(len(row_ids), smallest_bucket)
        before = np.asarray(state.accepted).sum(0), int(np.asarray(state.target_forwards).sum())
        start = time.perf_counter()
        state, rounds = _segment(
            (target, draft, verifier, sampling, eos),
            state,
            jnp.int32(_ROUNDS_PER_SEGMENT),
            jnp.int32(stop_below),
            num_draft,
        )
        accepted = np.asarray(state.accepted).sum(0) - before[0]
        seconds = time.perf_counter() - start
        # The first segment of a shape may have compiled, so its time says nothing.
        if (len(row_ids), num_draft) in seen:
            observation = SegmentObservation(
                rows=len(row_ids),
                length=num_draft,
                rounds=int(rounds),
                seconds=seconds,
                accepted=tuple(accepted[:num_draft].tolist()),
                active_rounds=int(np.asarray(state.target_forwards).sum()) - before[1],
            )
            length_state = length.update(length_state, observation)
        seen.add((len(row_ids), num_draft))
    return output.rollouts(prompts, samples)


def _check_lengths(target: AbstractLanguageModel, prompts: Prompts) -> None:
    longest = int(np.argmax(prompts.lengths))
    if prompts.lengths[longest] >= target.max_length:
        raise UserError(
            f"prompt {longest} has {prompts.lengths[longest]} tokens, but the model's context holds "
            f"{target.max_length}, completion included: shorten the prompt or use a model with a longer context"
        )


def _bucket(active: int, smallest: int) -> int:
    return max(1 << (active - 1).bit_length(), smallest)


def _shrink_below(rows: int, smallest: int) -> int:
    """The number of active rows at which a smaller bucket becomes possible; 0 if there is none."""
    half = 1 << ((rows - 1).bit_length() - 1) if rows > 1 else 0
    return half if half >= smallest else 0


@eqx.filter_jit
def _prefill(
    modules: tuple[AbstractLanguageModel, AbstractDraft, AbstractVerifier, AbstractSampling],
    tokens: Int[Array, "prompts seq"],
    lengths: Int[Array, " prompts"],
    limits: Int[Array, " prompts"],
    eos_ids: Int[Array, " eos"],
    key: Key[Array, ""],
    *,
    samples: int,
    new: int,
    capacity: int,
    cache_dtype: str,
) -> DecodeState:
    """One pass over the prompts, shared by the samples of each, and the first token of every row."""
    target, draft, verifier, sampling = modules
    num_prompts, width = tokens.shape
    cache = target.init_cache(num_prompts, capacity, jnp.dtype(cache_dtype))
    positions = jnp.broadcast_to(jnp.arange(width)[None], tokens.shape)
    features, cache = target.hidden(tokens, positions, cache, layers=draft.layers)
    last = jnp.take_along_axis(features.last, (lengths - 1)[:, None, None], axis=1)
    draft_state = draft.init(target, features, tokens, lengths, capacity)

    rows = num_prompts * samples
    prompt_of_row = jnp.repeat(jnp.arange(num_prompts), samples)
    keys = jax.vmap(lambda row: jr.fold_in(key, row))(jnp.arange(rows))
    logits = target.unembed(last)[prompt_of_row]
    distribution = sampling.distribution(logits)
    nothing = Proposal(jnp.zeros((rows, 0), jnp.int32), None)
    lengths = lengths[prompt_of_row]
    verdict = jax.vmap(verifier.verify)(distribution, nothing, keys, lengths)
    first = verdict.next_token[:, None].astype(jnp.int32)
    zeros = jnp.zeros(rows, jnp.int32)
    counts = jnp.zeros((rows, draft.max_length), jnp.int32)
    draft_state = jax.tree.map(lambda x: x[prompt_of_row], draft_state)
    state = DecodeState(
        tokens=jnp.zeros((rows, new), jnp.int32),
        logprobs=jnp.zeros((rows, new)),
        num_new=zeros,
        last_token=zeros,
        prompt_lengths=lengths,
        limits=limits[prompt_of_row],
        stop=jnp.full(rows, StopReason.RUNNING, jnp.int32),
        keys=keys,
        cache=take_rows(cache, prompt_of_row),
        draft=draft_state,
        target_forwards=zeros,
        drafted=counts,
        accepted=counts,
        emitted=zeros,
    )
    logprobs = sampling.logprobs(logits, distribution, first)
    state = commit(state, first, logprobs, zeros + 1, eos_ids, state.cache, draft_state)
    # The prompt's pass is no round: it would have to be made for plain decoding as well.
    return eqx.tree_at(lambda s: (s.target_forwards, s.emitted), state, (zeros, zeros))


@eqx.filter_jit(donate="all-except-first")
def _segment(
    modules: tuple[AbstractLanguageModel, AbstractDraft, AbstractVerifier, AbstractSampling, Int[Array, " eos"]],
    state: DecodeState,
    max_rounds: Int[Array, ""],
    stop_below: Int[Array, ""],
    length: int,
) -> tuple[DecodeState, Int[Array, ""]]:
    """Rounds until few enough rows are active, or `max_rounds`. DONATES the state."""
    target, draft, verifier, sampling, eos_ids = modules

    def more(carry):
        state, rounds = carry
        return (jnp.sum(state.active) > stop_below) & (rounds < max_rounds)

    def body(carry):
        state, rounds = carry
        return decode_round(target, draft, verifier, sampling, eos_ids, state, length), rounds + 1

    return lax.while_loop(more, body, (state, jnp.int32(0)))


@eqx.filter_jit
def _take_rows(state: DecodeState, rows: Int[Array, " kept"]) -> DecodeState:
    return jax.tree.map(lambda x: x[rows], state)


class _Output:
    """Host buffers that collect the rows as they leave the device."""

    def __init__(self, rows: int, new: int, max_draft: int):
        self.new = new
        self.tokens = np.zeros((rows, new), np.int32)
        self.logprobs = np.zeros((rows, new), np.float32)
        self.lengths = np.zeros(rows, np.int32)
        self.stop = np.zeros(rows, np.int32)
        self.target_forwards = np.zeros(rows, np.int32)
        self.emitted = np.zeros(rows, np.int32)
        self.drafted = np.zeros((rows, max_draft), np.int32)
        self.accepted = np.zeros((rows, max_draft), np.int32)

    def take(self, row_ids: Int[np.ndarray, " rows"], state: DecodeState) -> None:
        lengths = np.asarray(state.num_new)
        counts = np.arange(self.new)[None] < lengths[:, None]
        self.tokens[row_ids] = np.where(counts, np.asarray(state.tokens)[:, : self.new], 0)
        self.logprobs[row_ids] = np.where(counts, np.asarray(state.logprobs)[:, : self.new], 0.0)
        self.lengths[row_ids] = lengths
        self.stop[row_ids] = np.asarray(state.stop)
        self.target_forwards[row_ids] = np.asarray(state.target_forwards)
        self.emitted[row_ids] = np.asarray(state.emitted)
        self.drafted[row_ids] = np.asarray(state.drafted)
        self.accepted[row_ids] = np.asarray(state.accepted)

    def tokens_of_others(self, row_ids: Int[np.ndarray, " rows"]) -> int:
        return int(np.delete(self.lengths, row_ids).sum())

    def rollouts(self, prompts: Prompts, samples: int) -> Rollouts:
        group = np.repeat(np.arange(len(prompts.lengths), dtype=np.int32), samples)
        statistics = DecodeStatistics(self.target_forwards, self.drafted, self.accepted, self.emitted)
        return Rollouts(prompts, group, self.tokens, self.lengths, self.logprobs, self.stop, statistics)


def teacher_forced_logprobs(
    target: AbstractLanguageModel, sampling: AbstractSampling, rollouts: Rollouts
) -> Float[np.ndarray, "rows new"]:
    """The target's log-probabilities of the completions, from one plain forward without a cache.

    What the decoder reported must agree with this to rounding: the smoke alarm of losslessness.
    """
    prompts, group = rollouts.prompts, rollouts.group
    width = prompts.tokens.shape[1] + rollouts.tokens.shape[1]
    sequences = np.zeros((len(group), width), np.int32)
    index = np.zeros(rollouts.tokens.shape, np.int32)
    for row, prompt in enumerate(group):
        start = int(prompts.lengths[prompt])
        sequences[row, :start] = prompts.tokens[prompt, :start]
        sequences[row, start : start + rollouts.tokens.shape[1]] = rollouts.tokens[row]
        index[row] = start - 1 + np.arange(rollouts.tokens.shape[1])
    return np.asarray(
        _score(target, sampling, jnp.asarray(sequences), jnp.asarray(index), jnp.asarray(rollouts.tokens))
    )


@eqx.filter_jit
def _score(target, sampling, sequences, index, tokens):
    positions = jnp.broadcast_to(jnp.arange(sequences.shape[1])[None], sequences.shape)
    features, _ = target.hidden(sequences, positions, target.no_cache())
    logits = target.unembed(jnp.take_along_axis(features.last, index[:, :, None], axis=1))
    return sampling.logprobs(logits, sampling.distribution(logits), tokens)
