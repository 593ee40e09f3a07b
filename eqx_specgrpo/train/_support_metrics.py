"""What is recorded of truncated sampling."""

import numpy as np

from .._types import Rollouts
from ..config import GRPOConfig


def support_metrics(rollouts: Rollouts, grpo: GRPOConfig) -> dict[str, float]:
    """How many tokens were kept at each one that was drawn; nothing where the whole vocabulary was.

    Besides, where `grpo.max_support` is what bounds them, how often it may have: the share of tokens at which as many
    were kept.
    """
    if rollouts.support is None:
        return {}
    is_token = np.arange(rollouts.tokens.shape[1])[None] < rollouts.lengths[:, None]
    counts = np.asarray(rollouts.support.counts)[is_token]
    metrics = {
        "sampling/support_size/mean": float(counts.mean()),
        "sampling/support_size/max": float(counts.max()),
    }
    if grpo.top_k == 0:
        metrics["sampling/support_full"] = float((counts == grpo.max_support).mean())
    return metrics
