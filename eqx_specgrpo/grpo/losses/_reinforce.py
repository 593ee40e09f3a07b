from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._average import token_mean
from ._base import AbstractPolicyLoss, LossTraits, TokenInputs, TokenLosses
from ._normalizer import LossNormalizer
from ._option import option


class Reinforce(AbstractPolicyLoss):
    """`-A logprob`, with the advantage bounded."""

    traits: ClassVar[LossTraits] = LossTraits()

    reinforce_bound: Float[Array, ""] = option(3.0, "bound of the advantage", gt=0)

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        bounded = jnp.clip(tokens.advantages, -self.reinforce_bound, self.reinforce_bound)
        return TokenLosses(-bounded * tokens.logprobs, {})

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return token_mean(token_losses, completion_mask, normalizer)
