"""Per-token estimators of KL(policy || reference) from samples of the policy.

As a term of the loss, an estimator is differentiated: what counts there is not its value but its gradient. That of the
KL itself comes, in expectation, from k1 or k3 times the ratio of policy to sampler, wherever the samples come from; and
from k2 without the ratio, if they are the policy's own. k1 without the ratio has a gradient whose mean is 0; k3 without
it is right to first order in the distance only.

??? cite

    John Schulman, "Approximating KL divergence" (2020), for the names; "Rethinking KL regularization in RLHF",
    [arXiv:2510.01555](https://arxiv.org/abs/2510.01555), for gradients; the ratio: DeepSeek-V3.2,
    [arXiv:2512.02556](https://arxiv.org/abs/2512.02556).
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from .losses import MAX_LOG_RATIO

KLEstimator = Literal["k1", "k2", "k3"]


def kl_k1(logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes `log(policy/reference)`: unbiased, of high variance, may be negative. Its own gradient has mean zero."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes `log(policy/reference)**2 / 2`: biased, non-negative. On policy, its gradient is that of the KL."""
    return (logprobs - reference_logprobs) ** 2 / 2


def kl_k3(logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes `reference/policy - 1 - log(reference/policy)`: unbiased, non-negative, of low variance. GRPO's choice.

    The ratio is limited to `exp(20)`.
    """
    difference = jnp.maximum(logprobs - reference_logprobs, -MAX_LOG_RATIO)
    # expm1 keeps small differences, where the two terms cancel to first order.
    return jnp.expm1(-difference) + difference


KL_ESTIMATORS = MappingProxyType[KLEstimator, Callable[[Array, Array], Array]]({"k1": kl_k1, "k2": kl_k2, "k3": kl_k3})
