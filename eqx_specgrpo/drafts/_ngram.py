"""Drafting by looking up what followed the same words before."""

from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt32
from pydantic import Field

from .._types import Rollouts
from ..models import AbstractLanguageModel, Features
from ._base import DraftError, Proposal
from ._history import AbstractHistoryDraft
from ._kind import DraftKind
from ._ngram_memory import RolloutMemory, prompt_ids
from ._ngram_search import OUTSIDE, elect, find_matches, follow, newest_tokens

_UNRANKED = -1


class NGramState(eqx.Module):
    """The texts that each row looks into: its own, and its streams, one for every sibling and remembered rollout.

    A sibling's text is copied into the row's own stream of it round by round, so that it is still there when the
    sibling has finished and its row is gone.

    **Arguments:**

    - `prompt_id`: two words of hash; rows with the same are siblings.
    - `rank`: among the siblings, -1 before the first round; the stream of a sibling is that of its rank.
    - `context`: the prompt and the committed tokens that were fed to the target.
    - `length`, `prompt_length`: how many tokens of `context` count, and how many of them are the prompt's.
    - `streams`: the prompt's last tokens, then a completion.
    - `stream_lengths`: how many tokens of each stream count, 0 for none.
    """

    prompt_id: UInt32[Array, "rows 2"]
    rank: Int[Array, " rows"]
    context: Int[Array, "rows capacity"]
    length: Int[Array, " rows"]
    prompt_length: Int[Array, " rows"]
    streams: Int[Array, "rows streams slots"]
    stream_lengths: Int[Array, "rows streams"]


class NGramDraft(AbstractHistoryDraft[NGramState]):
    """Looks the newest tokens up in the row's own text, in what its group's siblings have said so far (finished ones
    included), and in earlier rollouts of the same prompt (He et al. 2023, "REST"; Saxena 2023, "prompt lookup").

    Each text has its say with the longest match in it, the latest where there are several, and proposes what follows
    there. The longest match of all counts; between texts that match as far, the majority; between equal votes the row's
    own text comes first, then siblings in the order of their rows, then remembered rollouts from the newest. A row's
    own text continues periodically beyond its end. Texts are searched whole at every round, token by token and on the
    device: no index has to be kept, and nothing goes to the host.

    A sibling's tokens are seen one round after they were committed. Where nothing matches the last token is proposed
    again and again, which is lossless like everything else, only rarely accepted.

    Trained: nothing. Kept with the draft, and grown by `remember` between steps: a memory of rollouts, which are found
    again by a hash of 64 bits of their prompt; a collision would cost acceptance, nothing else.

    **Arguments:**

    - `max_length`: the most tokens drafted.
    - `max_ngram`, `min_ngram`: the longest match that is told apart, and the shortest that is one.
    - `siblings`: how many rows with the same prompt each row listens to, itself included; the rest of a larger group
        is not listened to.
    - `memory_size`: how many rollouts are remembered in all. For the memory to be of use it must hold an epoch's.
    - `memory_length`: how many tokens of each, from its first.
    - `recalled`: how many of them, the newest with the same prompt, each row looks into.
    """

    max_length: int = eqx.field(static=True)
    max_ngram: int = eqx.field(static=True)
    min_ngram: int = eqx.field(static=True)
    siblings: int = eqx.field(static=True)
    recalled: int = eqx.field(static=True)
    memory: RolloutMemory

    def __init__(
        self,
        max_length: int,
        *,
        max_ngram: int = 4,
        min_ngram: int = 2,
        siblings: int = 16,
        memory_size: int = 512,
        memory_length: int = 256,
        recalled: int = 8,
    ):
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, but an n-gram draft drafts at least 1 token")
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram ({min_ngram}) must be at least 1 and at most max_ngram ({max_ngram})")
        for name, value in (("siblings", siblings), ("memory_size", memory_size), ("recalled", recalled)):
            if value < 0:
                raise ValueError(f"{name} is {value}, but can't be negative; 0 turns that source off")
        if memory_length < 1:
            raise ValueError(f"memory_length is {memory_length}, but must be at least 1; memory_size=0 forgets all")
        self.max_length = max_length
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self.siblings = siblings
        self.recalled = recalled
        self.memory = RolloutMemory.empty(memory_size, memory_length)

    @property
    def train_length(self) -> int:
        return 0

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    @property
    def match_classes(self) -> int:
        return self.max_ngram - self.min_ngram + 1

    def check(self, target: AbstractLanguageModel) -> None:
        largest = int(np.asarray(self.memory.tokens).max(initial=0))
        if largest >= target.vocab_size:
            raise DraftError(
                f"this n-gram draft remembers token {largest}, but the target's vocabulary has {target.vocab_size} "
                "tokens: its rollouts are another model's; start from a fresh NGramDraft"
            )

    def init(self, target, features, tokens, lengths, capacity) -> NGramState:
        return self.begin(target, features, tokens, lengths, capacity, capacity)

    def begin(self, target, features, tokens, lengths, capacity, first) -> NGramState:
        del target, features
        rows, seq = tokens.shape
        is_prompt = jnp.arange(seq)[None] < lengths[:, None]
        context = jnp.where(is_prompt, tokens, OUTSIDE).astype(jnp.int32)
        context = jnp.pad(context, ((0, 0), (0, first - seq)), constant_values=OUTSIDE)
        # So that a match may reach back into the prompt; what is before its first token is at the far end of the array.
        tail = jnp.flip(newest_tokens(context, lengths, self.max_ngram), axis=1)
        tail = jnp.where(tail < 0, OUTSIDE, tail)
        ids = prompt_ids(tokens, lengths)
        # What is recalled has all its room at once: which matches there are must not depend on what is there yet.
        remembered = self.memory.tokens.shape[1]
        recalled, recalled_lengths = self.memory.recall(
            ids, self.recalled, max(first - seq, min(capacity - seq, remembered))
        )
        completions = jnp.pad(
            recalled, ((0, 0), (self.siblings, 0), (0, 0)), constant_values=OUTSIDE
        )  # the siblings have said nothing yet
        tails = jnp.broadcast_to(tail[:, None], (rows, completions.shape[1], self.max_ngram))
        lengths = lengths.astype(jnp.int32)
        return NGramState(
            prompt_id=ids,
            rank=jnp.full(rows, _UNRANKED, jnp.int32),
            context=context,
            length=lengths,
            prompt_length=lengths,
            streams=jnp.concatenate([tails, completions], axis=-1),
            stream_lengths=jnp.pad(
                jnp.where(recalled_lengths > 0, recalled_lengths + self.max_ngram, 0), ((0, 0), (self.siblings, 0))
            ),
        )

    def grow(self, state: NGramState, capacity: int) -> NGramState:
        more = capacity - state.context.shape[1]
        return eqx.tree_at(
            lambda s: (s.context, s.streams),
            state,
            (
                jnp.pad(state.context, ((0, 0), (0, more)), constant_values=OUTSIDE),
                jnp.pad(state.streams, ((0, 0), (0, 0), (0, more)), constant_values=OUTSIDE),
            ),
        )

    @jax.named_scope("NGramDraft.propose")
    def propose_matches(
        self, target, state: NGramState, last_token, length: int
    ) -> tuple[Proposal, Int[Array, " rows"], NGramState]:
        del target
        if length > self.max_length:
            raise ValueError(f"{length} tokens were asked of an n-gram draft with a max_length of {self.max_length}")
        context = _write(state.context, last_token[:, None], state.length)
        total = state.length + 1
        newest = newest_tokens(context, total, self.max_ngram)
        ahead = jnp.arange(length)[None, None]

        own = context[:, None]
        own_matched, own_start = find_matches(own, total[:, None], newest, self.min_ngram)
        period = jnp.maximum(total[:, None] - own_start, 1)
        own_tokens = follow(own, own_start[..., None] + ahead % period[..., None])

        matched, start = find_matches(state.streams, state.stream_lengths, newest, self.min_ngram)
        index = start[..., None] + ahead
        matched = jnp.concatenate([own_matched, matched], axis=1)
        continuations = jnp.concatenate([own_tokens, follow(state.streams, index)], axis=1)
        known = jnp.concatenate([jnp.ones(own_tokens.shape, bool), index < state.stream_lengths[..., None]], axis=1)

        chain = elect(matched, continuations, known, last_token.astype(jnp.int32))
        state = eqx.tree_at(lambda s: s.context, state, context)
        return Proposal(chain, None), jnp.maximum(matched.max(-1) - (self.min_ngram - 1), 0), state

    def commit_active(self, target, state: NGramState, features, block, num_accepted, active) -> NGramState:
        # What a finished row is drafted is no part of its text, and its siblings must not read it.
        return self.commit(target, state, features, block, jnp.where(active, num_accepted, -1))

    @jax.named_scope("NGramDraft.commit")
    def commit(self, target, state: NGramState, features, block, num_accepted) -> NGramState:
        del target, features
        block = block.astype(jnp.int32)
        is_sibling = (state.prompt_id[:, None] == state.prompt_id[None]).all(-1)
        rank = _ranked(state.rank, is_sibling)
        # With -1 nothing is taken in. A finished row that is handed more goes on with what was never committed: a worse
        # source for its siblings from its end on, no error.
        num_new = num_accepted + 1

        source, has_source = _sources(rank, is_sibling, self.siblings)
        start = self.max_ngram + state.length - state.prompt_length
        offsets = jnp.arange(block.shape[1])[None, None]
        slots = state.streams.shape[-1]
        is_new = has_source[..., None] & (offsets < num_new[source][..., None])
        index = jnp.where(is_new, start[source][..., None] + offsets, slots + offsets)
        row, stream = jnp.arange(len(rank))[:, None, None], jnp.arange(self.siblings)[None, :, None]
        streams = state.streams.at[row, stream, index].set(block[source], mode="drop", unique_indices=True)
        lengths = jnp.where(
            has_source, jnp.minimum((start + num_new)[source], slots), state.stream_lengths[:, : self.siblings]
        )
        return NGramState(
            prompt_id=state.prompt_id,
            rank=rank,
            context=_write(state.context, block, state.length),
            length=jnp.minimum(state.length + num_new, state.context.shape[1] - 1),
            prompt_length=state.prompt_length,
            streams=streams,
            stream_lengths=jnp.concatenate([lengths, state.stream_lengths[:, self.siblings :]], axis=1),
        )

    def train_hidden(self, target, features: Features, tokens):
        del target, tokens
        return jnp.zeros((*features.last.shape[:-1], 0, features.last.shape[-1]))

    def train_logits(self, target, hidden):
        return target.unembed(hidden)

    def provenance(self) -> dict[str, Any]:
        memory_size, memory_length = self.memory.tokens.shape
        return {
            "max_length": self.max_length,
            "max_ngram": self.max_ngram,
            "min_ngram": self.min_ngram,
            "siblings": self.siblings,
            "memory_size": memory_size,
            "memory_length": memory_length,
            "recalled": self.recalled,
        }

    def remember(self, rollouts: Rollouts) -> "NGramDraft":
        return eqx.tree_at(lambda draft: draft.memory, self, self.memory.add(rollouts))


def _ranked(rank: Int[Array, " rows"], is_sibling: Bool[Array, "rows rows"]) -> Int[Array, " rows"]:
    """Numbers the rows of a group that have no number yet, after those that have one."""
    is_new = rank == _UNRANKED
    taken = jnp.max(jnp.where(is_sibling, rank[None] + 1, 0), axis=1)
    before = jnp.sum(is_sibling & is_new[None] & jnp.tri(len(rank), k=-1, dtype=bool), axis=1, dtype=jnp.int32)
    return jnp.where(is_new, taken + before, rank)


def _sources(
    rank: Int[Array, " rows"], is_sibling: Bool[Array, "rows rows"], siblings: int
) -> tuple[Int[Array, "rows siblings"], Bool[Array, "rows siblings"]]:
    """Which row's text each stream takes, and whether there is one; a row does not listen to itself."""
    rows = len(rank)
    first_of_group = jnp.argmax(is_sibling, axis=1)
    of_group = jnp.full((rows, siblings), rows).at[first_of_group, rank].set(jnp.arange(rows), mode="drop")
    source = of_group[first_of_group]
    has_source = (source < rows) & (source != jnp.arange(rows)[:, None])
    return jnp.where(has_source, source, 0), has_source


def _write(
    context: Int[Array, "rows capacity"], block: Int[Array, "rows block"], start: Int[Array, " rows"]
) -> Int[Array, "rows capacity"]:
    # A block that would end beyond the array is shifted by XLA: it can only be that of a row that has finished.
    return jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at,)))(
        context, block.astype(jnp.int32), start
    )


def _fresh(
    target: AbstractLanguageModel,
    max_length: int,
    *,
    min_ngram: Annotated[int, Field(ge=1)] | None = None,
    max_ngram: Annotated[int, Field(ge=1)] | None = None,
    siblings: Annotated[int, Field(ge=0)] = 16,
    memory_size: Annotated[int, Field(ge=0)] = 512,
    memory_length: Annotated[int, Field(ge=1)] = 256,
    recalled: Annotated[int, Field(ge=0)] = 8,
    key: PRNGKeyArray,
) -> NGramDraft:
    """**Arguments:**

    - `min_ngram`: tokens that must match at least; none: 2, or 3 in front of another draft
    - `max_ngram`: longest match that is told apart; none: 4, or min_ngram if that is more
    - `siblings`: rows with the same prompt that each row listens to, itself included
    - `memory_size`: rollouts remembered in all
    - `memory_length`: tokens remembered of each, from its first
    - `recalled`: remembered rollouts of the same prompt that each row looks into, the newest
    """
    del target, key
    shortest = 2 if min_ngram is None else min_ngram
    return NGramDraft(
        max_length,
        min_ngram=shortest,
        max_ngram=max(4, shortest) if max_ngram is None else max_ngram,
        siblings=siblings,
        memory_size=memory_size,
        memory_length=memory_length,
        recalled=recalled,
    )


def _rebuild(settings: dict[str, Any]) -> NGramDraft:
    return NGramDraft(**settings)


def _check(max_length: int, min_ngram: int | None = None, max_ngram: int | None = None, **options: Any) -> None:
    del max_length, options
    shortest = 2 if min_ngram is None else min_ngram
    if max_ngram is not None and max_ngram < shortest:
        raise ValueError(
            f"draft.options.max_ngram = {max_ngram} is less than the {shortest} tokens that must match at least: set "
            "a longer one, or a shorter draft.options.min_ngram"
        )


DRAFT = DraftKind(NGramDraft, fresh=_fresh, rebuild=_rebuild, check=_check, has_probabilities=False)
