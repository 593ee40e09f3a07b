"""What the policy's loss is given beside the rollouts: the reference's probabilities, weights, masks.

Each is computed once for a whole step, over the same micro-batches as the update, and then is a constant of the loss.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._types import ScoredRollouts
from ..config import RunParts
from ..grpo import (
    ADVANTAGE_ESTIMATORS,
    KL_ESTIMATORS,
    LossSettings,
    PlannedMicroBatch,
    UpdateBatch,
    batch_of_shards,
    compute_copy,
    correction_metrics,
    divide_rows,
    high_entropy_mask,
    importance_weights,
    policy_entropies,
    policy_logprobs,
    rows_of_shards,
    support_metrics,
)
from ..layout import ROWS, AbstractDeviceMesh
from ..models import AbstractLanguageModel


def of_batch(
    function: Callable[
        [AbstractLanguageModel, UpdateBatch, LossSettings, AbstractDeviceMesh], Float[Array, "part width"]
    ],
    model: AbstractLanguageModel,
    batch: UpdateBatch,
    plan: Sequence[PlannedMicroBatch],
    parts: RunParts,
) -> Float[np.ndarray, "rows new"]:
    """What a function says of each completion token of a step, one micro-batch at a time."""
    values, mesh = np.zeros(batch.old_logprobs.shape, np.float32), parts.mesh
    for micro in plan:
        divided = divide_rows(micro.rows, mesh.data)
        own = mesh.put(batch_of_shards(batch, divided, micro.width), ROWS)
        rows, found = rows_of_shards(mesh.fetch(function(model, own, parts.loss, mesh)), divided)
        values[rows, : found.shape[1]] = found
    return values


def loss_inputs(
    parts: RunParts,
    policy: AbstractLanguageModel,
    reference: AbstractLanguageModel | None,
    batch: UpdateBatch,
    plan: Sequence[PlannedMicroBatch],
    scored: ScoredRollouts,
) -> tuple[UpdateBatch, dict[str, float]]:
    """The batch with all that stays the same over a step's inner iterations, and the metrics of it.

    **Arguments:**

    - `policy`: as the rollouts were drawn with.
    - `reference`: in the dtype of computation, or `None`.
    - `plan`: how the batch is divided.
    - `scored`: what the batch was made of.
    """
    grpo = parts.config.grpo
    metrics = support_metrics(scored.rollouts, grpo.max_support if grpo.top_k == 0 else None)
    if reference is not None:
        batch = with_reference(parts, reference, batch, plan)
    if reference is not None and grpo.use_kl_in_reward:
        batch, further = with_kl_in_reward(parts, batch, scored)
        metrics |= further
    if grpo.importance_sampling_correction:
        weights = compute_copy(policy, parts.config.model.dtype, parts.mesh)
        batch, further = with_correction(parts, weights, batch, plan)
        metrics |= further
    return batch, metrics


def with_reference(
    parts: RunParts, reference: AbstractLanguageModel, batch: UpdateBatch, plan: Sequence[PlannedMicroBatch]
) -> UpdateBatch:
    """The batch with the reference's log-probabilities."""
    logprobs = of_batch(policy_logprobs, reference, batch, plan, parts)
    return eqx.tree_at(lambda b: b.reference_logprobs, batch, logprobs, is_leaf=lambda leaf: leaf is None)


def with_correction(
    parts: RunParts, weights: AbstractLanguageModel, batch: UpdateBatch, plan: Sequence[PlannedMicroBatch]
) -> tuple[UpdateBatch, dict[str, float]]:
    """The batch corrected for what the decoder's probabilities differ from the trainer's, and the metrics of it.

    The ratio in the loss is then to the trainer's own probabilities before the update.

    **Arguments:**

    - `weights`: those that the rollouts were drawn with, in the dtype of computation.
    """
    grpo = parts.config.grpo
    trainer = of_batch(policy_logprobs, weights, batch, plan, parts)
    sampler, mask = np.asarray(batch.old_logprobs), np.asarray(batch.completion_mask)
    correction = importance_weights(
        trainer,
        sampler,
        mask,
        grpo.importance_sampling_mode,
        grpo.importance_sampling_clip_min,
        grpo.importance_sampling_clip_max,
    )
    corrected = eqx.tree_at(
        lambda b: (b.old_logprobs, b.sampling_logprobs, b.importance_weights),
        batch,
        (trainer, sampler, correction),
        is_leaf=lambda leaf: leaf is None,
    )
    gaps = np.abs(trainer - sampler)[mask]
    metrics = {
        "sampling/sampling_logp_difference/mean": float(gaps.mean()) if gaps.size else 0.0,
        "sampling/sampling_logp_difference/max": float(gaps.max(initial=0.0)),
    }
    return corrected, metrics | correction_metrics(correction, mask, grpo.importance_sampling_mode)


def with_entropy_mask(
    parts: RunParts, weights: AbstractLanguageModel, batch: UpdateBatch, plan: Sequence[PlannedMicroBatch]
) -> UpdateBatch:
    """The batch with the tokens marked whose entropy is among the highest of the step."""
    entropies = of_batch(policy_entropies, weights, batch, plan, parts)
    mask = high_entropy_mask(entropies, np.asarray(batch.completion_mask), parts.config.grpo.top_entropy_quantile)
    return eqx.tree_at(lambda b: b.entropy_mask, batch, mask, is_leaf=lambda leaf: leaf is None)


def with_kl_in_reward(
    parts: RunParts, batch: UpdateBatch, scored: ScoredRollouts
) -> tuple[UpdateBatch, dict[str, float]]:
    """The batch with the advantages of rewards less `beta` times the KL of each completion, summed over its tokens, and
    without the KL as a term of the loss.

    ??? cite

        Ziegler et al. 2019, [arXiv:1909.08593](https://arxiv.org/abs/1909.08593), equation 2; on the two places,
        [arXiv:2512.21852](https://arxiv.org/abs/2512.21852).

    **Arguments:**

    - `batch`: with the reference's log-probabilities.
    - `scored`: the same rollouts; what is recorded of them stays what the functions gave.
    """
    assert batch.reference_logprobs is not None
    grpo, rollouts = parts.config.grpo, scored.rollouts
    mask = np.asarray(batch.completion_mask)
    kl = KL_ESTIMATORS[grpo.kl_estimator](jnp.asarray(batch.old_logprobs), jnp.asarray(batch.reference_logprobs))
    kl = np.where(mask, np.asarray(kl), 0.0)
    advantages = ADVANTAGE_ESTIMATORS[grpo.advantage_estimator](
        scored.rewards - grpo.beta * kl.sum(1), rollouts.group, len(rollouts.prompts.lengths), grpo.scale_rewards
    )
    batch = eqx.tree_at(lambda b: (b.advantages, b.reference_logprobs), batch, (advantages, None))
    return batch, {"kl": float(kl.sum() / max(mask.sum(), 1))}
