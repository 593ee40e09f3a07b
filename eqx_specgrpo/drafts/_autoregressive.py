"""Drafting with a language model that has a cache of its own: what `ModelDraft` and `LayerSkipDraft` share.

Keys and values depend on tokens alone, so what was written for drafted tokens stays right for those that are accepted.
The state therefore says how many tokens are committed and how many of them the cache holds. What is missing, the
backlog, is absorbed at the start of the next draft: after a round of drafting it is the last committed token, and one
drafted token more where all were accepted, for the last of a chain is drawn but never fed. Rounds without drafting only
make the backlog longer.
"""

from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..models import AbstractLanguageModel, Cache, KVCache, default_cache_dtype, fill_cache
from ._base import Proposal, pick_positions
from ._sampler import AbstractSampler
from ._vocabulary import AbstractDraftVocabulary

# Positions a pass: of the one that every draft begins with (the backlog after a round of drafting), and of those that
# go before it where rounds without drafting have left more.
_NARROW, _WIDE = 2, 16


def check_max_length(kind: str, max_length: int) -> None:
    """Raises if a draft of this kind is to draft fewer than one token, or more than the decoder ever asks for."""
    if not 1 <= max_length <= 8:
        raise ValueError(
            f"max_length is {max_length}, but a {kind} drafts 1 to 8 tokens: longer chains lose more in verification "
            "than they gain"
        )


class AutoregressiveState(eqx.Module):
    """What a drafting model remembers of the rows. Every array has the row as its leading axis.

    **Arguments:**

    - `cache`: the drafting model's. Its slots below `absorbed` are right; what lies beyond is not seen until it has
        been overwritten.
    - `tokens`: by absolute position: the committed tokens, then those last drafted.
    - `committed`: how many tokens are committed and have been fed to the target; the last committed one has not been.
    - `absorbed`: how many of `tokens`, from the first, the cache holds. At most `committed`, but for drafted tokens
        between `draft_chain` and `take_in`.
    """

    cache: Cache
    tokens: Int[Array, "rows capacity"]
    committed: Int[Array, " rows"]
    absorbed: Int[Array, " rows"]


def start(
    model: AbstractLanguageModel, tokens: Int[Array, "rows seq"], lengths: Int[Array, " rows"], capacity: int
) -> AutoregressiveState:
    """The state after the drafting model has read right-padded prompts."""
    rows, seq = tokens.shape
    _, cache = fill_cache(model, tokens, model.init_cache(rows, capacity, default_cache_dtype(model)))
    history = jnp.zeros((rows, capacity), jnp.int32).at[:, :seq].set(tokens)
    lengths = lengths.astype(jnp.int32)
    return AutoregressiveState(cache, history, lengths, lengths)


def make_room(state: AutoregressiveState, capacity: int) -> AutoregressiveState:
    """The state with room for more positions. Its layers' caches are `KVCache`s."""
    cache = tuple(layer.with_slots(capacity) for layer in cast(tuple[KVCache, ...], state.cache))
    tokens = jnp.pad(state.tokens, ((0, 0), (0, capacity - state.tokens.shape[1])))
    return AutoregressiveState(cache, tokens, state.committed, state.absorbed)


def catch_up(
    model: AbstractLanguageModel, state: AutoregressiveState, last_token: Int[Array, " rows"]
) -> tuple[Float[Array, "rows hidden"], AutoregressiveState]:
    """Absorbs the backlog and the last committed token.

    A pass covers as many positions in every row, so it may begin before a row's backlog: what is there already is
    written once more, and nothing beyond the row's own tokens is. One pass is all, unless rounds went by without
    drafting.

    **Returns:**

    The drafting model's hidden states, which predict the token after `last_token`, and the state, in which `absorbed`
    is one more than `committed`.
    """
    rows, capacity = state.tokens.shape
    tokens = state.tokens.at[jnp.arange(rows), state.committed].set(last_token)
    total = state.committed + 1
    narrow, wide = min(_NARROW, capacity), min(_WIDE, capacity)

    def absorb(cache, begin, width):
        positions = begin[:, None] + jnp.arange(width)[None]
        return model.hidden(jnp.take_along_axis(tokens, positions, axis=1), positions, cache)

    def is_behind(carry):
        _, absorbed = carry
        return jnp.any(total - absorbed > narrow)

    def one_pass(carry):
        cache, absorbed = carry
        begin = jnp.maximum(jnp.minimum(absorbed, total - wide), 0)
        _, cache = absorb(cache, begin, wide)
        return cache, jnp.minimum(begin + wide, total)

    cache, _ = lax.while_loop(is_behind, one_pass, (state.cache, state.absorbed))
    begin = jnp.maximum(total - narrow, 0)
    features, cache = absorb(cache, begin, narrow)
    return pick_positions(features.last, state.committed - begin), AutoregressiveState(
        cache, tokens, state.committed, total
    )


def draft_chain(
    model: AbstractLanguageModel,
    vocabulary: AbstractDraftVocabulary,
    state: AutoregressiveState,
    last_token: Int[Array, " rows"],
    sampler: AbstractSampler,
    length: int,
) -> tuple[Proposal, AutoregressiveState]:
    """Drafts `length` tokens a row, at least one. The last of them is not fed to the drafting model.

    Finished rows may have no room left: nothing is written at or beyond the capacity.
    """
    rows, capacity = state.tokens.shape
    hidden, state = catch_up(model, state, last_token)
    first, distribution = sampler(vocabulary.unembed(model, hidden), 0, vocabulary.support)

    def step(carry, offset):
        cache, tokens, token = carry
        index = state.committed + offset
        position = jnp.minimum(index, capacity - 1)
        tokens = tokens.at[jnp.arange(rows), index].set(token, mode="drop")
        features, cache = model.hidden(token[:, None], position[:, None], cache)
        logits = vocabulary.unembed(model, features.last[:, 0])
        token, distribution = sampler(logits, offset, vocabulary.support)
        return (cache, tokens, token), (token, distribution)

    carry, (more, distributions) = lax.scan(step, (state.cache, state.tokens, first), jnp.arange(1, length))
    proposal = Proposal(
        *jax.tree.map(
            lambda one, others: jnp.concatenate([one[:, None], jnp.moveaxis(others, 0, 1)], axis=1),
            (first, distribution),
            (more, distributions),
        )
    )
    cache, tokens, _ = carry
    absorbed = jnp.minimum(state.absorbed + length - 1, capacity)
    return proposal, AutoregressiveState(cache, tokens, state.committed, absorbed)


def take_in(
    state: AutoregressiveState, block: Int[Array, "rows block"], num_accepted: Int[Array, " rows"]
) -> AutoregressiveState:
    """Commits a round's block: no pass of any model.

    The cache is right as far as it was fed what has now been committed. That is looked up, not assumed: where another
    draft's tokens were verified in place of this one's, the cache holds nothing of them.

    **Arguments:**

    - `block`: the last committed token of the round before, then the drafted tokens.
    - `num_accepted`: how many of these were kept.
    """
    rows, capacity = state.tokens.shape
    index = state.committed[:, None] + jnp.arange(block.shape[1])[None]
    fed = state.tokens.at[jnp.arange(rows)[:, None], index].get(mode="fill", fill_value=-1)
    num_same = jnp.cumprod(fed == block, axis=1).sum(1)
    tokens = state.tokens.at[jnp.arange(rows)[:, None], index].set(block, mode="drop")
    # Rows that have finished are still handed to this, round after round.
    committed = jnp.minimum(state.committed + num_accepted + 1, capacity - 1)
    absorbed = jnp.minimum(jnp.minimum(state.absorbed, state.committed + num_same), committed)
    return AutoregressiveState(state.cache, tokens, committed, absorbed)
