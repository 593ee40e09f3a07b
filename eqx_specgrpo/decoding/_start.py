"""How rows begin: one pass over each prompt, shared by its samples, and the first token of every row."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, DTypeLike, Float, Int, Key

from .._types import StopReason
from ..drafts import AbstractDraft, Proposal
from ..models import AbstractLanguageModel, Cache, fill_cache
from ..sampling import AbstractSampling
from ._state import DecodeState, commit
from ._support import empty_buffer, support_of
from ._verify import AbstractVerifier

Modules = tuple[AbstractLanguageModel, AbstractDraft, AbstractVerifier, AbstractSampling, Int[Array, " eos"]]


class PromptState(eqx.Module):
    """What the pass over the prompts leaves; every array has the prompt as its leading axis.

    **Arguments:**

    - `lengths`, `limits`: of the prompts, and the most tokens that a row may emit.
    - `logits`: of the first new token.
    - `cache`: the target's, with room for the beginning of rows, or for prompts alone where rows share them.
    - `draft`: the draft's state, with room for the beginning of rows.
    - `tokens`: as many as there is room for at first, all zero.
    """

    lengths: Int[Array, " prompts"]
    limits: Int[Array, " prompts"]
    logits: Float[Array, "prompts vocab"]
    cache: Cache
    draft: Any
    tokens: Int[Array, "prompts new"]


def prompt_pass(
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    tokens: Int[Array, "prompts seq"],
    lengths: Int[Array, " prompts"],
    limits: Int[Array, " prompts"],
    new: int,
    whole: int,
    slots: int,
    capacity: int,
    cache_dtype: DTypeLike,
) -> PromptState:
    """The target's pass over the right-padded prompts, long ones a piece at a time.

    **Arguments:**

    - `new`: positions of a row behind its prompt that there is room for at first.
    - `whole`: positions in all that there is room for at first.
    - `slots`: of the target's caches: as many, or fewer where rows share what is in them.
    - `capacity`: positions that a row may come to.
    """
    num_prompts, _ = tokens.shape
    cache = target.init_cache(num_prompts, slots, cache_dtype)
    features, cache = fill_cache(target, tokens, cache, layers=draft.layers)
    last = jnp.take_along_axis(features.last, (lengths - 1)[:, None, None], axis=1)
    draft_state = draft.begin(target, features, tokens, lengths, capacity, whole)
    return PromptState(
        lengths, limits, target.unembed(last)[:, 0], cache, draft_state, jnp.zeros((num_prompts, new), jnp.int32)
    )


def start_rows(
    modules: Modules,
    prompts: PromptState,
    key: Key[Array, ""],
    row_ids: Int[Array, " rows"],
    prompt_of_row: Int[Array, " rows"],
    cache: Cache,
) -> DecodeState:
    """Rows with their first token.

    **Arguments:**

    - `key`: of the whole decoding; a row's own derives from it and the row's id.
    - `row_ids`, `prompt_of_row`: which rows, and the prompt of each.
    - `cache`: the rows' own.
    """
    _, draft, verifier, sampling, eos_ids = modules
    rows = row_ids.shape[0]
    keys = jax.vmap(lambda row: jr.fold_in(key, row))(row_ids)
    lengths = prompts.lengths[prompt_of_row]
    logits = prompts.logits[prompt_of_row][:, None]
    distribution = sampling.distribution(logits)
    nothing = Proposal(jnp.zeros((rows, 0), jnp.int32), None)
    verdict = jax.vmap(verifier.verify)(distribution.dense(logits.shape[-1]), nothing, keys, lengths)
    first = verdict.next_token[:, None].astype(jnp.int32)
    zeros = jnp.zeros(rows, jnp.int32)
    counts = jnp.zeros((rows, draft.max_length), jnp.int32)
    tokens = prompts.tokens[prompt_of_row]
    support = support_of(distribution)
    state = DecodeState(
        tokens=tokens,
        logprobs=jnp.zeros(tokens.shape),
        support=empty_buffer(support, tokens.shape[1]),
        num_new=zeros,
        last_token=zeros,
        prompt_lengths=lengths,
        limits=prompts.limits[prompt_of_row],
        stop=jnp.full(rows, StopReason.RUNNING, jnp.int32),
        finite=jnp.ones(rows, bool),
        keys=keys,
        cache=cache,
        draft=jax.tree.map(lambda x: x[prompt_of_row], prompts.draft),
        target_forwards=zeros,
        drafted=counts,
        accepted=counts,
        emitted=zeros,
    )
    logprobs = sampling.logprobs(logits, distribution, first)
    state = commit(state, first, logprobs, support, zeros + 1, eos_ids, state.cache, state.draft)
    # The prompt's pass is no round: it would have to be made for plain decoding as well.
    return eqx.tree_at(lambda s: (s.target_forwards, s.emitted), state, (zeros, zeros))
