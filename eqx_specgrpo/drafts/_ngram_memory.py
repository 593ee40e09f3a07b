"""Completions of earlier steps, found again by their prompt."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, UInt32

from .._types import Rollouts
from ._ngram_search import OUTSIDE


class RolloutMemory(eqx.Module):
    """A ring of completions, the newest in place of the oldest. Integers: no optimizer takes them for weights.

    **Arguments:**

    - `prompt_ids`: of the completion's prompt, see `prompt_ids`.
    - `tokens`, `lengths`: the first tokens of each completion; length 0 where there is none yet.
    - `next`: where the next one goes.
    """

    prompt_ids: UInt32[Array, "memory 2"]
    tokens: Int[Array, "memory new"]
    lengths: Int[Array, " memory"]
    next: Int[Array, ""]

    @staticmethod
    def empty(size: int, length: int) -> "RolloutMemory":
        """Room for `size` completions of `length` tokens."""
        return RolloutMemory(
            jnp.zeros((size, 2), jnp.uint32),
            jnp.zeros((size, length), jnp.int32),
            jnp.zeros(size, jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def add(self, rollouts: Rollouts) -> "RolloutMemory":
        """The memory with these rollouts in it, in the order of their rows. On the host; no shape changes."""
        size, length = self.tokens.shape
        if size == 0:
            return self
        ids = np.asarray(prompt_ids(jnp.asarray(rollouts.prompts.tokens), jnp.asarray(rollouts.prompts.lengths)))
        newest = np.arange(len(rollouts.group))[-size:]
        slots = (int(self.next) + np.arange(len(newest))) % size
        width = min(length, rollouts.tokens.shape[1])
        kept = np.minimum(rollouts.lengths[newest], width)
        is_kept = np.arange(width)[None] < kept[:, None]
        all_ids, tokens, lengths = (np.array(x) for x in (self.prompt_ids, self.tokens, self.lengths))
        all_ids[slots] = ids[rollouts.group[newest]]
        tokens[slots, :width] = np.where(is_kept, rollouts.tokens[newest, :width], 0)
        lengths[slots] = kept
        after = jnp.asarray((int(self.next) + len(newest)) % size, jnp.int32)
        return RolloutMemory(jnp.asarray(all_ids), jnp.asarray(tokens), jnp.asarray(lengths), after)

    def recall(
        self, ids: UInt32[Array, "prompts 2"], count: int, room: int
    ) -> tuple[Int[Array, "prompts recalled room"], Int[Array, "prompts recalled"]]:
        """The newest completions of each prompt, the newest first, and how many of their tokens there are.

        **Arguments:**

        - `count`: the most completions a prompt.
        - `room`: the most tokens a completion.
        """
        size, length = self.tokens.shape
        count = min(count, size)
        if count == 0:
            return jnp.zeros((len(ids), 0, room), jnp.int32), jnp.zeros((len(ids), 0), jnp.int32)
        newness = (jnp.arange(size, dtype=jnp.int32) - self.next) % size + 1
        is_same = (ids[:, None] == self.prompt_ids[None]).all(-1) & (self.lengths > 0)[None]
        newness, index = lax.top_k(jnp.where(is_same, newness[None], 0), count)
        lengths = jnp.where(newness > 0, jnp.minimum(self.lengths[index], room), 0)
        tokens = jnp.where(jnp.arange(length)[None, None] < lengths[..., None], self.tokens[index], OUTSIDE)
        padding = ((0, 0), (0, 0), (0, max(room - length, 0)))
        return jnp.pad(tokens, padding, constant_values=OUTSIDE)[..., :room], lengths


@jax.jit
def prompt_ids(tokens: Int[Array, "prompts seq"], lengths: Int[Array, " prompts"]) -> UInt32[Array, "prompts 2"]:
    """Two words of hash of each prompt; padding, and how much of it there is, makes no difference."""
    places = jnp.arange(tokens.shape[1], dtype=jnp.uint32)[None]
    is_prompt = places < lengths[:, None].astype(jnp.uint32)
    words = []
    for seed in (0x9E3779B9, 0x85EBCA77):
        mixed = _mix(tokens.astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D) + _mix(places + jnp.uint32(seed)))
        words.append(jnp.sum(jnp.where(is_prompt, mixed, 0), axis=1, dtype=jnp.uint32))
    return jnp.stack(words, axis=1)


def _mix(word: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Every bit of the result depends on every bit of the word (the finalizer of MurmurHash3)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
