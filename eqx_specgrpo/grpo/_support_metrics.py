"""What is recorded of truncated sampling."""

import numpy as np

from .._types import Rollouts


def support_metrics(rollouts: Rollouts, max_support: int | None) -> dict[str, float]:
    """How many tokens were kept at each one that was drawn; nothing where the whole vocabulary was.

    **Arguments:**

    - `max_support`: where it is this that bounds them: then also how often it may have, the share of tokens at which so
        many were kept.
    """
    if rollouts.support is None:
        return {}
    is_token = np.arange(rollouts.tokens.shape[1])[None] < rollouts.lengths[:, None]
    counts = np.asarray(rollouts.support.counts)[is_token]
    metrics = {
        "sampling/support_size/mean": float(counts.mean()),
        "sampling/support_size/max": float(counts.max()),
    }
    if max_support is not None:
        metrics["sampling/support_full"] = float((counts == max_support).mean())
    return metrics
