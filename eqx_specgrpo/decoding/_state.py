"""What the decoder carries between rounds, and the only functions that commit anything to it or take it back."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from .._types import StopReason, Support
from ..models import Cache
from ._support import written


class DecodeState(eqx.Module):
    """All that changes from round to round. Every array has the row as its leading axis.

    **Arguments:**

    - `tokens`: emitted tokens; what lies at or beyond `num_new` is not committed.
    - `logprobs`: the target's log-probabilities of them.
    - `support`: what truncated sampling kept at each of them; `None` where that is not recorded.
    - `num_new`: how many tokens each row has emitted.
    - `last_token`: the newest of them, not yet fed to the target.
    - `prompt_lengths`, `limits`: the prompt's length and the most tokens the row may emit.
    - `stop`: `StopReason` values; a row is active while it is `RUNNING`.
    - `finite`: whether all logits that the row's tokens were drawn or checked by had finite normalizers.
    - `keys`: one a row; every draw derives from it and from an absolute position.
    - `cache`: the target's.
    - `draft`: the draft's state.
    - `target_forwards`, `drafted`, `accepted`, `emitted`: counts, see `DecodeStatistics`.
    """

    tokens: Int[Array, "rows new"]
    logprobs: Float[Array, "rows new"]
    support: Support | None
    num_new: Int[Array, " rows"]
    last_token: Int[Array, " rows"]
    prompt_lengths: Int[Array, " rows"]
    limits: Int[Array, " rows"]
    stop: Int[Array, " rows"]
    finite: Bool[Array, " rows"]
    keys: Key[Array, " rows"]
    cache: Cache
    draft: Any
    target_forwards: Int[Array, " rows"]
    drafted: Int[Array, "rows max_draft"]
    accepted: Int[Array, "rows max_draft"]
    emitted: Int[Array, " rows"]

    @property
    def active(self) -> Bool[Array, " rows"]:
        return self.stop == StopReason.RUNNING


def fits(
    emitted: Int[Array, "rows block"],
    eos_ids: Int[Array, " eos"],
    num_valid: Int[Array, " rows"],
    room: Int[Array, " rows"],
) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """How many of a block's tokens are committed, and why the row stops there, if it does.

    **Arguments:**

    - `emitted`: a block of tokens a row.
    - `eos_ids`: end-of-sequence ids; the first of them to appear is the last token committed.
    - `num_valid`: how many tokens of the block count.
    - `room`: how many more the row may emit.

    **Returns:**

    The number of tokens to commit and the `StopReason` a row.
    """
    offsets = jnp.arange(emitted.shape[1])[None]
    is_eos = (emitted[:, :, None] == eos_ids[None, None]).any(-1) & (offsets < num_valid[:, None])
    until_eos = jnp.where(is_eos.any(-1), jnp.argmax(is_eos, axis=-1) + 1, emitted.shape[1] + 1)
    count = jnp.minimum(jnp.minimum(num_valid, until_eos), room)
    stop = jnp.where(
        count == until_eos, StopReason.EOS, jnp.where(count >= room, StopReason.LENGTH, StopReason.RUNNING)
    )
    return count.astype(jnp.int32), stop.astype(jnp.int32)


def commit(
    state: DecodeState,
    emitted: Int[Array, "rows block"],
    logprobs: Float[Array, "rows block"],
    support: Support | None,
    num_valid: Int[Array, " rows"],
    eos_ids: Int[Array, " eos"],
    cache: Cache,
    draft: Any,
) -> DecodeState:
    """Writes a round's tokens at each row's own cursor and moves the cursors. Finished rows do not move.

    **Arguments:**

    - `emitted`: the accepted drafted tokens, then the next token, then anything.
    - `logprobs`: the target's log-probabilities of them.
    - `support`: what each of them was drawn from, if the state keeps that.
    - `num_valid`: accepted tokens plus one.
    - `eos_ids`: see `fits`.
    - `cache`, `draft`: as the round left them.
    """
    active = state.active
    count, stop = fits(emitted, eos_ids, num_valid, state.limits - state.num_new)
    count = jnp.where(active, count, 0)
    last = jnp.take_along_axis(emitted, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]

    def write(row, block, start):
        return lax.dynamic_update_slice(row, block, (start,))

    drafted = emitted.shape[1] - 1
    offsets = jnp.arange(drafted)[None]
    was_drafted = jnp.broadcast_to(active[:, None], (active.shape[0], drafted))
    was_accepted = offsets < jnp.minimum(num_valid - 1, count)[:, None]
    # A token that could be drawn has a finite log-probability, and logits that are no distribution have none.
    is_finite = jnp.isfinite(logprobs) | (jnp.arange(drafted + 1)[None] >= count[:, None])
    return DecodeState(
        tokens=jax.vmap(write)(state.tokens, emitted, state.num_new),
        logprobs=jax.vmap(write)(state.logprobs, logprobs, state.num_new),
        support=written(state.support, support, state.num_new),
        num_new=state.num_new + count,
        last_token=jnp.where(active, last, state.last_token),
        prompt_lengths=state.prompt_lengths,
        limits=state.limits,
        stop=jnp.where(active, stop, state.stop),
        finite=state.finite & is_finite.all(-1),
        keys=state.keys,
        cache=cache,
        draft=draft,
        target_forwards=state.target_forwards + active,
        drafted=state.drafted.at[:, :drafted].add(was_drafted.astype(jnp.int32)),
        accepted=state.accepted.at[:, :drafted].add((was_accepted & was_drafted).astype(jnp.int32)),
        emitted=state.emitted + count,
    )


def cut(state: DecodeState, rows: Bool[Array, " rows"], ends: Int[Array, " rows"]) -> DecodeState:
    """The state with some rows ended, at tokens that they have emitted already. For the host.

    Of a row's passes those count that its kept tokens took: all of them in proportion, rounded up, for which round
    emitted which token is not known.

    **Arguments:**

    - `rows`: which.
    - `ends`: how many of their tokens are kept, at least 1.
    """
    num_new = jnp.where(rows, ends, state.num_new)
    # The first token came of the prompt's pass, not of a round.
    emitted = jnp.where(rows, ends - 1, state.emitted)
    stop = jnp.where(rows, StopReason.STOP, state.stop)
    whole = jnp.maximum(state.emitted, 1)
    forwards = jnp.where(rows, -(-state.target_forwards * emitted // whole), state.target_forwards)
    return eqx.tree_at(
        lambda s: (s.num_new, s.emitted, s.stop, s.target_forwards), state, (num_new, emitted, stop, forwards)
    )
