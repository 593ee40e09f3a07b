"""The policy's losses, as pure functions on arrays.

Every loss is divided by counts of the *whole* optimizer step, which come in as a `LossNormalizer`. So the losses and
gradients of micro-batches are added, never averaged, and their sum equals what one large batch gives.
"""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ._kl import kl_k3
from ._metrics import PolicyLossMetrics

LossType = Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"]

# exp(20) is 5e8: beyond any ratio that training survives, and far from float32's overflow, whose gradient is NaN even
# in the branch that the clip does not take.
_MAX_LOG_RATIO = 20.0


def _as_float32(x: Float[ArrayLike, ""] | Int[ArrayLike, ""]) -> Float[Array, ""]:
    # An array, never a Python number: a number would be a compile-time constant, and each step a compilation.
    return jnp.asarray(x, jnp.float32)


class LossNormalizer(eqx.Module):
    """What the losses of one optimizer step are divided by, counted over *all* its micro-batches.

    **Arguments:**

    - `num_tokens`: completion tokens that count. Used by `dapo` and `cispo`.
    - `num_rows`: completions, those with an empty mask included, rows that only pad the last micro-batch excluded.
        Used by `grpo` and `dr_grpo`.
    - `max_completion_length`: the limit under which the completions were generated. Used by `dr_grpo`.
    - `num_micro_batches`: how many micro-batches make up the step. Used by `bnpo`.
    """

    num_tokens: Float[Array, ""] = eqx.field(converter=_as_float32)
    num_rows: Float[Array, ""] = eqx.field(converter=_as_float32)
    max_completion_length: Float[Array, ""] = eqx.field(converter=_as_float32)
    num_micro_batches: Float[Array, ""] = eqx.field(converter=_as_float32, default=1)

    @staticmethod
    def from_mask(
        completion_mask: Bool[Array | np.ndarray, "rows new"],
        max_completion_length: int | None = None,
        *,
        num_rows: int | None = None,
        num_micro_batches: int = 1,
    ) -> "LossNormalizer":
        """Counts a whole step's mask. `max_completion_length` defaults to its width, `num_rows` to its height."""
        rows, new = completion_mask.shape
        return LossNormalizer(
            completion_mask.sum(),
            rows if num_rows is None else num_rows,
            new if max_completion_length is None else max_completion_length,
            num_micro_batches,
        )


def aggregate_token_losses(
    token_losses: Float[Array, "rows new"],
    completion_mask: Bool[Array, "rows new"],
    loss_type: LossType,
    normalizer: LossNormalizer,
) -> Float[Array, ""]:
    """This micro-batch's share of the step's loss; the shares of all micro-batches add up to it.

    - `dapo`, `cispo`: sum over tokens / tokens of the step. Every token weighs the same
        ([arXiv:2503.14476](https://arxiv.org/abs/2503.14476)).
    - `grpo`: mean over each completion's tokens, sum over completions / completions of the step
        ([arXiv:2402.03300](https://arxiv.org/abs/2402.03300)).
    - `dr_grpo`: sum over tokens / (completions of the step x `max_completion_length`), a constant
        ([arXiv:2503.20783](https://arxiv.org/abs/2503.20783)).
    - `bnpo`: mean over the tokens of *this micro-batch* / number of micro-batches. TRL's name; the one type that
        depends on how a step is divided, for a token weighs more in a micro-batch with fewer of them. Undivided, it
        equals `dapo`.
    """
    # `where` rather than a product: what lies in the padding may be infinite or NaN.
    token_losses = jnp.where(completion_mask, token_losses.astype(jnp.float32), 0.0)
    counts = completion_mask.astype(jnp.float32)
    total = token_losses.sum()
    match loss_type:
        case "dapo" | "cispo":
            return total / jnp.maximum(normalizer.num_tokens, 1.0)
        case "grpo":
            sequence_losses = token_losses.sum(1) / jnp.maximum(counts.sum(1), 1.0)
            return sequence_losses.sum() / jnp.maximum(normalizer.num_rows, 1.0)
        case "dr_grpo":
            return total / jnp.maximum(normalizer.num_rows * normalizer.max_completion_length, 1.0)
        case "bnpo":
            return total / jnp.maximum(counts.sum(), 1.0) / normalizer.num_micro_batches
        case _:
            raise ValueError(f"loss_type is {loss_type!r}: use 'dapo', 'grpo', 'bnpo', 'dr_grpo' or 'cispo'")


def policy_loss(
    logprobs: Float[Array, "rows new"],
    old_logprobs: Float[Array, "rows new"] | None,
    advantages: Float[Array, " rows"] | Float[Array, "rows new"],
    completion_mask: Bool[Array, "rows new"],
    *,
    normalizer: LossNormalizer,
    loss_type: LossType = "dapo",
    epsilon: Float[ArrayLike, ""] = 0.2,
    epsilon_high: Float[ArrayLike, ""] | None = None,
    delta: Float[ArrayLike, ""] | None = None,
    beta: Float[ArrayLike, ""] = 0.0,
    reference_logprobs: Float[Array, "rows new"] | None = None,
    importance_sampling_level: Literal["token", "sequence"] = "token",
) -> tuple[Float[Array, ""], PolicyLossMetrics]:
    """The clipped surrogate of GRPO and its relatives, to be minimised.

    With the ratio `r = exp(logprobs - old_logprobs)` and the advantage `A`, a token's loss is
    `-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta k3`; for `cispo` it is
    `-stop_gradient(min(r, epsilon_high)) A logprobs + beta k3`. How tokens are weighted is told by
    [`eqx_specgrpo.grpo.aggregate_token_losses`][].

    ??? cite

        GRPO [arXiv:2402.03300](https://arxiv.org/abs/2402.03300), DAPO [arXiv:2503.14476](https://arxiv.org/abs/2503.14476),
        Dr. GRPO [arXiv:2503.20783](https://arxiv.org/abs/2503.20783), GSPO [arXiv:2507.18071](https://arxiv.org/abs/2507.18071),
        CISPO [arXiv:2506.13585](https://arxiv.org/abs/2506.13585).

    **Arguments:**

    - `logprobs`: of the completion tokens under the policy being trained, at the distribution they were sampled from.
    - `old_logprobs`: under the policy that sampled them, at the same distribution. `None` forces a ratio of 1 whose
        gradient is still that of the policy (on-policy training).
    - `advantages`: one a row, or one a token.
    - `completion_mask`: `True` where a token counts. Elsewhere the other arrays may hold anything, NaN included.
    - `normalizer`: the counts of the whole optimizer step.
    - `loss_type`: static.
    - `epsilon`, `epsilon_high`: clip range; `epsilon_high=None` means `epsilon`. For `cispo`, `epsilon_high` is the cap
        on the ratio itself, as in TRL (5.0, say), has no default, and there is no lower clip.
    - `delta`: upper bound on the ratio in the unclipped branch (two-sided clipping), which bounds the loss where the
        advantage is negative; should exceed `1 + epsilon_high`. Not for `cispo`.
    - `beta`, `reference_logprobs`: coefficient of the k3 estimate of KL(policy || reference), and the reference's
        log-probabilities; without the latter there is no such term.
    - `importance_sampling_level`: static. `"sequence"` replaces the ratios of a row by their geometric mean (GSPO). Use
        it with `loss_type="grpo"`: the other types would weight each sequence by its length.

    **Returns:**

    The micro-batch's share of the loss, float32, and sums to compute metrics from.
    """
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError("loss_type 'cispo' needs epsilon_high, the largest ratio that is let through: give 5.0, say")
    if loss_type == "cispo" and delta is not None:
        raise ValueError("delta has no meaning with loss_type 'cispo', whose ratio is capped by epsilon_high: omit it")
    if reference_logprobs is None and isinstance(beta, int | float) and beta != 0:
        raise ValueError(f"beta is {beta}, but reference_logprobs is None: give the reference's log-probabilities")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level is {importance_sampling_level!r}: use 'token' or 'sequence'")
    if epsilon_high is None:
        epsilon_high = epsilon

    # Padding is made harmless before any arithmetic, so that neither values nor gradients can be NaN.
    def masked(x: Float[Array, "rows new"]) -> Float[Array, "rows new"]:
        return jnp.where(completion_mask, x.astype(jnp.float32), 0.0)

    logprobs = masked(logprobs)
    old_logprobs = lax.stop_gradient(logprobs if old_logprobs is None else masked(old_logprobs))
    advantages = advantages.astype(jnp.float32)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], logprobs.shape)
    # A row without a single token may have a NaN for an advantage; it has no say either.
    advantages = lax.stop_gradient(masked(advantages))

    token_log_ratio = logprobs - old_logprobs
    weights = completion_mask.astype(jnp.float32)  # of each position in the metrics on clipping
    log_ratio = token_log_ratio
    if importance_sampling_level == "sequence":
        lengths = jnp.maximum(weights.sum(1, keepdims=True), 1.0)
        log_ratio = jnp.broadcast_to(token_log_ratio.sum(1, keepdims=True) / lengths, logprobs.shape)
        weights = weights / lengths
    ratio = jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))

    if loss_type == "cispo":
        token_losses = -lax.stop_gradient(jnp.minimum(ratio, epsilon_high)) * advantages * logprobs
        clipped_low = jnp.zeros_like(completion_mask)
        clipped_high = (ratio > epsilon_high) & (advantages > 0)
    else:
        clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high)
        unclipped = ratio if delta is None else jnp.minimum(ratio, delta)
        token_losses = -jnp.minimum(unclipped * advantages, clipped * advantages)
        clipped_low = (ratio < 1 - epsilon) & (advantages < 0)
        clipped_high = (ratio > 1 + epsilon_high) & (advantages > 0)

    kl_sum = None
    if reference_logprobs is not None:
        kl = kl_k3(logprobs, lax.stop_gradient(masked(reference_logprobs)))
        token_losses = token_losses + beta * kl
        kl_sum = lax.stop_gradient(kl.sum())

    log_gap = lax.stop_gradient(jnp.abs(token_log_ratio))
    metrics = PolicyLossMetrics(
        num_tokens=completion_mask.astype(jnp.float32).sum(),
        clip_count=weights.sum(),
        clip_low_sum=jnp.where(clipped_low, weights, 0.0).sum(),
        clip_high_sum=jnp.where(clipped_high, weights, 0.0).sum(),
        log_ratio_abs_sum=log_gap.sum(),
        log_ratio_abs_max=log_gap.max(initial=0.0),
        kl_sum=kl_sum,
    )
    return aggregate_token_losses(token_losses, completion_mask, loss_type, normalizer), metrics
