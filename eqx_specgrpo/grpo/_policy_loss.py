"""The policy's whole loss: what a loss type says of each token, and the terms that any of them may have beside it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from ._kl import KL_ESTIMATORS, KLEstimator
from ._metrics import PolicyLossMetrics
from .losses import DAPO, AbstractPolicyLoss, Level, LossNormalizer, TokenInputs, ratio_of


def policy_loss(
    logprobs: Float[Array, "rows new"],
    old_logprobs: Float[Array, "rows new"] | None,
    advantages: Float[Array, " rows"] | Float[Array, "rows new"],
    completion_mask: Bool[Array, "rows new"],
    *,
    normalizer: LossNormalizer,
    loss: AbstractPolicyLoss | None = None,
    importance_sampling_level: Level = "token",
    beta: Float[ArrayLike, ""] = 0.0,
    reference_logprobs: Float[Array, "rows new"] | None = None,
    kl_estimator: KLEstimator = "k3",
    use_bias_correction_kl: bool = True,
    importance_weights: Float[Array, "rows new"] | None = None,
    off_policy_mask_threshold: Float[ArrayLike, ""] | None = None,
    sampling_logprobs: Float[Array, "rows new"] | None = None,
    entropy_mask: Bool[Array, "rows new"] | None = None,
    entropies: Float[Array, "rows new"] | None = None,
    entropy_coef: Float[ArrayLike, ""] = 0.0,
) -> tuple[Float[Array, ""], PolicyLossMetrics]:
    """Computes the loss that GRPO and its relatives minimise.

    The token losses of `loss` are set to 0 by the masks, multiplied by `importance_weights`, increased by `beta` times
    the KL, and averaged as `loss` says; then `entropy_coef` times the mean entropy is subtracted.

    **Arguments:**

    - `logprobs`: of the completion tokens under the policy being trained, at the distribution they were sampled from.
    - `old_logprobs`: under the policy that sampled them, at the same distribution. `None` forces a ratio of 1 whose
        gradient is still that of the policy (on-policy training).
    - `advantages`: one a row, or one a token.
    - `completion_mask`: `True` where a token counts. Elsewhere the other arrays may hold anything, NaN included.
    - `normalizer`: the counts of the whole optimizer step.
    - `loss`: see [`eqx_specgrpo.grpo.losses.POLICY_LOSSES`][]; `DAPO()` by default.
    - `importance_sampling_level`: static. `"sequence"` replaces the ratios of a row by their geometric mean (GSPO,
        [arXiv:2507.18071](https://arxiv.org/abs/2507.18071)). Use it with `GRPO`, `SAPO` or `LUSPO`: the others would
        weight each sequence by its length.
    - `beta`, `reference_logprobs`: coefficient of the KL from the reference, and the reference's log-probabilities;
        without the latter there is no such term.
    - `kl_estimator`: static, see [`eqx_specgrpo.grpo.KL_ESTIMATORS`][].
    - `use_bias_correction_kl`: static. Multiply the estimate by the ratio, gradient included
        ([arXiv:2512.02556](https://arxiv.org/abs/2512.02556); TRL's default since 1.16).
    - `importance_weights`: of the old policy over the sampler, from [`eqx_specgrpo.grpo.importance_weights`][]; `None`
        if the two are taken for equal.
    - `off_policy_mask_threshold`: completions with a negative advantage whose mean `log(sampler/policy)` is larger are
        left out (DeepSeek-V3.2, equation 9). `None`: none is.
    - `sampling_logprobs`: the sampler's, for that comparison; `old_logprobs` by default.
    - `entropy_mask`: the tokens that teach, and whose entropy the bonus is for; `None`: all that count. The KL is of
        all of them in any case.
    - `entropies`, `entropy_coef`: of the sampling distribution at each token, differentiable, and the coefficient of
        the bonus; without the former there is none. Their mean is over the tokens of the step, whatever `loss` is.

    **Returns:**

    The micro-batch's share of the loss, float32, and sums to compute metrics from.
    """
    loss = DAPO() if loss is None else loss
    _check(loss, importance_sampling_level, beta, reference_logprobs, kl_estimator)

    # Padding is made harmless before any arithmetic, so that neither values nor gradients can be NaN.
    def masked(x: Float[Array, "rows new"]) -> Float[Array, "rows new"]:
        return jnp.where(completion_mask, x.astype(jnp.float32), 0.0)

    def constant(x: Float[Array, "rows new"]) -> Float[Array, "rows new"]:
        return lax.stop_gradient(masked(x))

    logprobs = masked(logprobs)
    old_logprobs = lax.stop_gradient(logprobs if old_logprobs is None else masked(old_logprobs))
    advantages = advantages.astype(jnp.float32)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], logprobs.shape)
    # A row without a single token may have a NaN for an advantage; it has no say either.
    advantages = constant(advantages)

    token_log_ratio = logprobs - old_logprobs
    counts = completion_mask.astype(jnp.float32)
    lengths = jnp.maximum(counts.sum(1, keepdims=True), 1.0)
    log_ratio, weights = token_log_ratio, counts  # weights of each position in the metrics on clipping
    if importance_sampling_level == "sequence":
        log_ratio = jnp.broadcast_to(token_log_ratio.sum(1, keepdims=True) / lengths, logprobs.shape)
        weights = counts / lengths
    correction = None if importance_weights is None else constant(importance_weights)
    tokens = TokenInputs(logprobs, old_logprobs, log_ratio, advantages, completion_mask, correction)
    token_losses, of_tokens = loss.token_losses(tokens)

    if off_policy_mask_threshold is not None:
        sampled = old_logprobs if sampling_logprobs is None else constant(sampling_logprobs)
        drift = lax.stop_gradient((sampled - logprobs).sum(1, keepdims=True) / lengths)
        left_out = (advantages < 0) & (drift > off_policy_mask_threshold)
        token_losses = jnp.where(left_out, 0.0, token_losses)
        of_tokens = {**of_tokens, "off_policy/masked_mean": left_out}
    if entropy_mask is not None:
        token_losses = jnp.where(entropy_mask, token_losses, 0.0)
    if correction is not None and not loss.traits.corrects_itself:
        token_losses = token_losses * correction

    kl_sum = None
    if reference_logprobs is not None:
        kl = KL_ESTIMATORS[kl_estimator](logprobs, constant(reference_logprobs))
        if use_bias_correction_kl:
            kl = kl * ratio_of(log_ratio)
        token_losses = token_losses + beta * kl
        kl_sum = lax.stop_gradient(kl.sum())
    total = loss.average(token_losses, completion_mask, normalizer)

    bonus = None
    if entropies is not None:
        of_bonus = completion_mask if entropy_mask is None else completion_mask & entropy_mask
        count = normalizer.num_tokens if normalizer.num_entropy_tokens is None else normalizer.num_entropy_tokens
        bonus = jnp.where(of_bonus, entropies, 0.0).sum() / jnp.maximum(count, 1.0)
        total = total - entropy_coef * bonus

    log_gap = lax.stop_gradient(jnp.abs(token_log_ratio))
    metrics = PolicyLossMetrics(
        num_tokens=counts.sum(),
        weight=weights.sum(),
        sums={name: (weights * jnp.where(completion_mask, x, 0.0)).sum() for name, x in of_tokens.items()},
        log_ratio_abs_sum=log_gap.sum(),
        log_ratio_abs_max=log_gap.max(initial=0.0),
        kl_sum=kl_sum,
        entropy_bonus=None if bonus is None else lax.stop_gradient(bonus),
    )
    return total, metrics


def _check(
    loss: AbstractPolicyLoss,
    level: str,
    beta: Float[ArrayLike, ""],
    reference_logprobs: Float[Array, "rows new"] | None,
    kl_estimator: str,
) -> None:
    if reference_logprobs is None and isinstance(beta, int | float) and beta != 0:
        raise ValueError(f"beta is {beta}, but reference_logprobs is None: give the reference's log-probabilities")
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level is {level!r}: use 'token' or 'sequence'")
    if level not in loss.traits.levels:
        raise ValueError(
            f"importance_sampling_level is {level!r}, but {type(loss).__name__} is made for {loss.traits.levels[0]!r}: "
            "give that, or another loss"
        )
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator is {kl_estimator!r}: use one of {', '.join(KL_ESTIMATORS)}")
