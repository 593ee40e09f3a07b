"""From `[grpo]` to how tokens of rollouts are drawn."""

import jax.numpy as jnp

from ..sampling import AbstractSampling, Sampling, TruncatedSampling
from ._grpo import GRPOConfig


def rollout_sampling(grpo: GRPOConfig) -> AbstractSampling:
    """With a truncation, one whose kept tokens are recorded, so that the loss is of what was drawn from."""
    temperature = jnp.float32(grpo.temperature)
    if not grpo.truncates:
        return Sampling(temperature)
    return TruncatedSampling(
        temperature,
        max_support=grpo.max_support,
        top_k=grpo.top_k or None,
        top_p=grpo.top_p if grpo.top_p < 1 else None,
        min_p=grpo.min_p,
    )
