"""Per-token estimators of KL(policy || reference) from samples of the policy."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def kl_k1(logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`log(policy/reference)`: unbiased, of high variance, may be negative. Its own gradient has mean zero.

    ??? cite

        The names are from John Schulman, "Approximating KL divergence" (2020).
    """
    return logprobs - reference_logprobs


def kl_k2(logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`log(policy/reference)**2 / 2`: biased, non-negative. As a loss its gradient is that of the KL, on policy."""
    return (logprobs - reference_logprobs) ** 2 / 2


def kl_k3(logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`reference/policy - 1 - log(reference/policy)`: unbiased, non-negative, of low variance. GRPO's choice."""
    difference = logprobs - reference_logprobs
    # expm1 keeps small differences, where the two terms cancel to first order.
    return jnp.expm1(-difference) + difference
