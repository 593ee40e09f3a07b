"""Log-probabilities of given completions, from one forward without a cache."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._types import Rollouts, Support
from ..models import AbstractLanguageModel, sequence_features
from ..sampling import AbstractSampling, Categorical, TruncatedSampling, restricted, temper


def teacher_forced_logprobs(
    target: AbstractLanguageModel, sampling: AbstractSampling, rollouts: Rollouts
) -> Float[np.ndarray, "rows new"]:
    """Computes the target's log-probabilities of the completions, with one plain forward pass without a cache.

    The decoder's log-probabilities must agree with these to rounding: this is the smoke alarm of losslessness. If the
    rollouts have a `support`, probabilities are normalised over it. It is not computed again, because it might then
    differ by a token at its edge.
    """
    sequences, before = whole_sequences(rollouts)
    tokens, support = jnp.asarray(rollouts.tokens), jax.tree.map(jnp.asarray, rollouts.support)
    return np.asarray(_score(target, sampling, sequences, before, tokens, support))


@eqx.filter_jit
def _score(
    target: AbstractLanguageModel,
    sampling: AbstractSampling,
    sequences: Int[Array, "rows seq"],
    before: Int[Array, "rows new"],
    tokens: Int[Array, "rows new"],
    support: Support | None,
) -> Float[Array, "rows new"]:
    logits = completion_logits(target, sequences, before)
    if support is not None:
        assert isinstance(sampling, TruncatedSampling)
        kept = temper(restricted(logits, support.ids, support.counts), sampling.temperature)
        return Categorical(kept, jax.nn.logsumexp(kept, axis=-1), jnp.asarray(support.ids)).logprob(tokens)
    return sampling.logprobs(logits, sampling.distribution(logits), tokens)


def whole_sequences(rollouts: Rollouts) -> tuple[Int[Array, "rows seq"], Int[Array, "rows new"]]:
    """Joins prompts and completions, right-padded, and returns the position before each token of the completions."""
    prompts, group = rollouts.prompts, rollouts.group
    rows, new = rollouts.tokens.shape
    sequences = np.zeros((rows, prompts.tokens.shape[1] + new), np.int32)
    starts = prompts.lengths[group].astype(np.int32)
    for row, (prompt, start) in enumerate(zip(group, starts, strict=True)):
        sequences[row, :start] = prompts.tokens[prompt, :start]
        sequences[row, start : start + new] = rollouts.tokens[row]
    return jnp.asarray(sequences), jnp.asarray(starts[:, None] - 1 + np.arange(new, dtype=np.int32)[None])


def completion_logits(
    target: AbstractLanguageModel, sequences: Int[Array, "rows seq"], before: Int[Array, "rows new"]
) -> Float[Array, "rows new vocab"]:
    """Computes the target's logits at each token of the completions, with one plain forward pass without a cache."""
    features = sequence_features(target, sequences)
    return target.unembed(jnp.take_along_axis(features.last, before[:, :, None], axis=1))
