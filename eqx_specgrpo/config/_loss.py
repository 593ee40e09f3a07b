"""From `[grpo]` to what the loss is computed by."""

from ..grpo import AbstractEntropyControl, AdaptiveEntropyCoef, FixedEntropyCoef, LossSettings, make_policy_loss
from ._grpo import GRPOConfig


def loss_settings(grpo: GRPOConfig, layers: tuple[int, ...]) -> LossSettings:
    """How the policy's loss is computed.

    **Arguments:**

    - `layers`: the target's layers whose outputs the draft will want to learn from.
    """
    return LossSettings(
        temperature=grpo.temperature,
        loss=make_policy_loss(grpo.loss_type, grpo.loss_options),
        # In the reward it is no term of the loss.
        beta=0.0 if grpo.use_kl_in_reward else grpo.beta,
        off_policy_mask_threshold=grpo.off_policy_mask_threshold,
        entropy_coef=grpo.entropy_coef,
        importance_sampling_level=grpo.importance_sampling_level,
        kl_estimator=grpo.kl_estimator,
        use_bias_correction_kl=grpo.use_bias_correction_kl,
        entropy_bonus=grpo.entropy_coef > 0 or grpo.use_adaptive_entropy,
        chunk=grpo.logprob_chunk,
        layers=layers,
        gradient_checkpointing=grpo.gradient_checkpointing is True,  # "auto" is decided for each update
    )


def entropy_control(grpo: GRPOConfig) -> AbstractEntropyControl:
    """How the coefficient of the entropy bonus goes on from step to step."""
    if not grpo.use_adaptive_entropy:
        return FixedEntropyCoef(grpo.entropy_coef)
    return AdaptiveEntropyCoef(
        grpo.entropy_coef, grpo.entropy_target, grpo.entropy_coef_delta, grpo.entropy_coef_min, grpo.entropy_coef_max
    )
