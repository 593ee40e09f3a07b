import math
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ._average import token_mean
from ._base import MAX_LOG_RATIO, AbstractPolicyLoss, LossTraits, TokenInputs, TokenLosses
from ._normalizer import LossNormalizer
from ._option import option

_MIN_LOG_WEIGHT = math.log(1e-8)


def gamma_weight(
    log_weight: Float[Array, "*shape"], k: Float[Array, "*shape"], lambda_: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`phi(w) = exp(lambda) w^k exp(-lambda w)`, which is 1 at `w = 1`; computed from `log(w)`.

    ??? cite

        VESPO, [arXiv:2602.10693](https://arxiv.org/abs/2602.10693).
    """
    log_weight = jnp.clip(log_weight, _MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    return jnp.exp(lambda_ + k * log_weight - lambda_ * jnp.exp(log_weight))


class VESPO(AbstractPolicyLoss):
    """`-stop_gradient(phi(w)) A logprob`, where `w` is the product of a completion's ratios.

    `phi` is the weight of [`eqx_specgrpo.grpo.losses.gamma_weight`][]; its parameters go by the sign of the advantage.

    ??? cite

        Variational sequence-level soft policy optimization, [arXiv:2602.10693](https://arxiv.org/abs/2602.10693).
    """

    traits: ClassVar[LossTraits] = LossTraits(
        levels=("token",), correction_modes=("token_truncate", "token_mask"), corrects_itself=True
    )

    vespo_k_pos: Float[Array, ""] = option(2.0, "power of the weight, advantage not negative", ge=0)
    vespo_lambda_pos: Float[Array, ""] = option(3.0, "decay of the weight, advantage not negative", gt=0)
    vespo_k_neg: Float[Array, ""] = option(3.0, "power of the weight, negative advantage", ge=0)
    vespo_lambda_neg: Float[Array, ""] = option(2.0, "decay of the weight, negative advantage", gt=0)

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        log_weight = jnp.clip(tokens.log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        if tokens.importance_weights is not None:
            # A weight that was masked to 0 takes its sequence out.
            log_weight = log_weight + jnp.log(jnp.maximum(tokens.importance_weights, math.exp(_MIN_LOG_WEIGHT)))
        log_weight = jnp.where(tokens.mask, log_weight, 0.0).sum(1, keepdims=True)
        positive = tokens.advantages >= 0
        phi = gamma_weight(
            jnp.broadcast_to(log_weight, positive.shape),
            jnp.where(positive, self.vespo_k_pos, self.vespo_k_neg),
            jnp.where(positive, self.vespo_lambda_pos, self.vespo_lambda_neg),
        )
        phi = lax.stop_gradient(phi)
        return TokenLosses(-phi * tokens.advantages * tokens.logprobs, {"vespo/phi_seq_mean": phi})

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return token_mean(token_losses, completion_mask, normalizer)
