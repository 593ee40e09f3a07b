"""Where the newest tokens occurred before, and what followed them: pure functions on integer arrays.

Everything is compared token by token. There is no hash that could collide, and nothing whose result depends on the
order in which a device works.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Two tokens that no text has, and that are not equal: what lies outside a stream, and what lies before a row's start.
OUTSIDE, BEFORE_START = -1, -2


def newest_tokens(
    context: Int[Array, "rows capacity"], lengths: Int[Array, " rows"], count: int
) -> Int[Array, "rows count"]:
    """The last `count` tokens of each row, the newest first; `BEFORE_START` where the row is shorter."""
    index = lengths[:, None] - 1 - jnp.arange(count)[None]
    tokens = jnp.take_along_axis(context, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, tokens, BEFORE_START)


def find_matches(
    streams: Int[Array, "rows streams slots"],
    lengths: Int[Array, "rows streams"],
    newest: Int[Array, "rows ngram"],
    min_ngram: int,
) -> tuple[Int[Array, "rows streams"], Int[Array, "rows streams"]]:
    """In each stream, the latest of the longest occurrences of a row's newest tokens that something follows.

    **Arguments:**

    - `streams`: token ids, those at or beyond the length are not looked at.
    - `newest`: see `newest_tokens`; the longest match that is told apart.
    - `min_ngram`: fewer equal tokens are no match.

    **Returns:**

    How many tokens match, 0 if there is no match, and the slot of the token after the match.
    """
    slots, max_ngram = streams.shape[-1], newest.shape[-1]
    slot = jnp.arange(slots)[None, None]
    same = jnp.ones(streams.shape, bool)
    matched = jnp.zeros(streams.shape, jnp.int32)
    for back in range(max_ngram):
        shifted = jnp.pad(streams, ((0, 0), (0, 0), (back, 0)), constant_values=OUTSIDE)[..., :slots]
        same = same & (shifted == newest[:, back][:, None, None])
        matched = matched + same
    # Longer first, then later, as one number: an argmax would go through the slots one by one on CPU.
    counts = (matched >= min_ngram) & (slot < lengths[..., None] - 1)
    best = jnp.max(jnp.where(counts, matched * slots + slot, 0), axis=-1)
    return best // slots, best % slots + 1


def follow(
    streams: Int[Array, "rows streams slots"], index: Int[Array, "rows streams draft"]
) -> Int[Array, "rows streams draft"]:
    """The tokens at some slots; beyond the last slot it is the last one's."""
    return jnp.take_along_axis(streams, jnp.minimum(index, streams.shape[-1] - 1), axis=-1)


def elect(
    matched: Int[Array, "rows streams"],
    continuations: Int[Array, "rows streams draft"],
    known: Bool[Array, "rows streams draft"],
    last_token: Int[Array, " rows"],
) -> Int[Array, "rows draft"]:
    """One chain a row from what the streams say.

    At each position the streams with the longest match vote, and the first of those with most votes wins; streams that
    said something else, or whose text ends, are out from there on. Where none is left the token before is repeated.

    A vote because streams are draws from nearly the same distribution: what most of them say is likelier than what any
    one says.

    **Arguments:**

    - `matched`: 0 for streams without a match.
    - `continuations`: what follows the match.
    - `known`: which of these are there.
    """
    token, chain = last_token, []
    for position in range(continuations.shape[-1]):
        says = continuations[..., position]
        matched = jnp.where(known[..., position], matched, 0)
        longest = matched.max(-1, keepdims=True)
        may_vote = (matched == longest) & (longest > 0)
        votes = jnp.sum(may_vote[:, None] & (says[:, None] == says[:, :, None]), axis=-1)
        winner = jnp.argmax(jnp.where(may_vote, votes, 0), axis=-1)
        elected = jnp.take_along_axis(says, winner[:, None], axis=1)[:, 0]
        token = jnp.where(longest[:, 0] > 0, elected, token)
        chain.append(token)
        matched = jnp.where(says == token[:, None], matched, 0)
    return jnp.stack(chain, axis=1)
