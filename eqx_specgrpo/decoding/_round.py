"""One round of speculative decoding: propose, check, verify, commit."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..drafts import AbstractDraft, NoDraft
from ..models import AbstractLanguageModel
from ..sampling import AbstractSampling
from ._prompts import AbstractPromptStore
from ._state import DecodeState, commit
from ._support import support_of
from ._verify import AbstractVerifier


def decode_round(
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    verifier: AbstractVerifier,
    sampling: AbstractSampling,
    eos_ids: Int[Array, " eos"],
    prompts: AbstractPromptStore,
    state: DecodeState,
    length: int,
) -> DecodeState:
    """Advances every active row by one to `length + 1` tokens with one pass of the target."""
    next_position = state.prompt_lengths + state.num_new

    # Propose: the draft guesses `length` tokens after the last committed one. Length 0 never touches the draft here.
    proposer = draft if length > 0 else NoDraft()
    with jax.named_scope("propose"):
        sampler = verifier.sampler(sampling, state.keys, next_position)
        draft_state = state.draft if length > 0 else ()
        proposal, draft_state = proposer.propose(target, draft_state, state.last_token, sampler, length)
        draft_state = draft_state if length > 0 else state.draft

    # Check: one pass of the target over the last committed token and the guesses.
    with jax.named_scope("check"):
        block = jnp.concatenate([state.last_token[:, None], proposal.tokens], axis=1)
        positions = (next_position - 1)[:, None] + jnp.arange(length + 1)[None]
        features, cache = target.hidden(block, positions, prompts.attach(state.cache), layers=draft.layers)
        logits = target.unembed(features.last)
        distribution = sampling.distribution(logits)

    # Verify: how many guesses stand, and the token that follows them.
    with jax.named_scope("verify"):
        target_law = distribution.dense(logits.shape[-1])
        verdict = jax.vmap(verifier.verify)(target_law, proposal, state.keys, next_position)
        guesses = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
        is_guess = jnp.arange(length + 1)[None] < verdict.num_accepted[:, None]
        emitted = jnp.where(is_guess, guesses, verdict.next_token[:, None])
        logprobs = sampling.logprobs(logits, distribution, emitted)

    # Commit: the only place where anything of a row moves.
    with jax.named_scope("commit"):
        draft_state = draft.commit_active(target, draft_state, features, block, verdict.num_accepted, state.active)
        state = dataclasses.replace(state, finite=state.finite & (proposal.finite() | ~state.active))
        support, num_valid = support_of(distribution), verdict.num_accepted + 1
        return commit(state, emitted, logprobs, support, num_valid, eos_ids, prompts.detach(cache), draft_state)
