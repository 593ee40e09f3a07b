"""Correction for a sampler whose probabilities are not the trainer's: other rounding, or weights of a step before."""

import numpy as np
from jaxtyping import Bool, Float

from .losses import MAX_LOG_RATIO, CorrectionMode


def importance_weights(
    old_logprobs: Float[np.ndarray, "rows new"],
    sampling_logprobs: Float[np.ndarray, "rows new"],
    completion_mask: Bool[np.ndarray, "rows new"],
    mode: CorrectionMode,
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> Float[np.ndarray, "rows new"]:
    """Computes the weight of each token's loss: the ratio of the trainer's and the sampler's probability, within
    bounds.

    It runs on the host, once per step. In the modes of sequences, a completion has one ratio, the product of its
    tokens' ratios. A ratio beyond a bound is set to the bound (truncate) or to 0 (mask).

    ??? cite

        Truncated: "Your efficient RL framework secretly brings you off-policy RL training" (Yao et al. 2025); masked,
        by token: IcePop (Ling team, 2025).

    **Arguments:**

    - `old_logprobs`: log-probabilities of the completions' tokens under the trainer's weights before the update.
    - `sampling_logprobs`: log-probabilities that the decoder stored.
    - `completion_mask`: `True` where a token counts. Elsewhere the weight is 1.
    - `mode`: TRL's names.
    - `clip_min`, `clip_max`: the bounds; `None`: no bound.
    """
    gaps = np.where(completion_mask, old_logprobs - sampling_logprobs, 0.0).astype(np.float64)
    level, _, what = mode.partition("_")
    if level == "sequence":
        gaps = np.broadcast_to(gaps.sum(1, keepdims=True), gaps.shape)
    ratios = np.exp(np.clip(gaps, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    low, high = 0.0 if clip_min is None else clip_min, np.inf if clip_max is None else clip_max
    if what == "truncate":
        weights = np.clip(ratios, low, high)
    else:
        weights = np.where((ratios < low) | (ratios > high), 0.0, ratios)
    return np.where(completion_mask, weights, 1.0).astype(np.float32)


def correction_metrics(
    weights: Float[np.ndarray, "rows new"], completion_mask: Bool[np.ndarray, "rows new"], mode: CorrectionMode
) -> dict[str, float]:
    """Computes the least, mean and largest weight of tokens, or of completions in the modes of sequences, by TRL's
    names."""
    if mode.startswith("sequence"):
        rows = completion_mask.any(1)
        of = weights[rows][np.arange(rows.sum()), completion_mask[rows].argmax(1)]
    else:
        of = weights[completion_mask]
    least, mean, most = (float(of.min()), float(of.mean()), float(of.max())) if of.size else (0.0, 0.0, 0.0)
    return {
        "sampling/importance_sampling_ratio/min": least,
        "sampling/importance_sampling_ratio/mean": mean,
        "sampling/importance_sampling_ratio/max": most,
    }
