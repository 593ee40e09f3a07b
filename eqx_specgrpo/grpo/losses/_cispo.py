from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ._average import token_mean
from ._base import AbstractPolicyLoss, LossTraits, TokenInputs, TokenLosses
from ._normalizer import LossNormalizer
from ._option import option


class CISPO(AbstractPolicyLoss):
    """With the ratio `r` and the advantage `A`, `-stop_gradient(min(r, epsilon_high)) A logprob`.

    The ratio is a constant weight, so that a capped token keeps its gradient. `epsilon_high` is the cap itself, as in
    TRL, and there is no lower clip.

    ??? cite

        MiniMax-M1 [arXiv:2506.13585](https://arxiv.org/abs/2506.13585); the cap alone: ScaleRL
        [arXiv:2510.13786](https://arxiv.org/abs/2510.13786).
    """

    traits: ClassVar[LossTraits] = LossTraits()

    epsilon_high: Float[Array, ""] = option(5.0, "the largest ratio that is let through; none: 5.0", gt=0)

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        ratio = tokens.ratio
        weight = lax.stop_gradient(jnp.minimum(ratio, self.epsilon_high))
        capped = (ratio > self.epsilon_high) & (tokens.advantages > 0)
        return TokenLosses(-weight * tokens.advantages * tokens.logprobs, {"cispo_clip_ratio": capped})

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return token_mean(token_losses, completion_mask, normalizer)
