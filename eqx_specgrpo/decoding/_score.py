"""Log-probabilities of given completions, from one forward without a cache."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._sampling import AbstractSampling
from .._types import Rollouts
from ..models import AbstractLanguageModel


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
