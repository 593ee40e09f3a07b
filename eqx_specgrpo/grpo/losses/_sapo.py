from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._average import sequence_mean
from ._base import AbstractPolicyLoss, LossTraits, TokenInputs, TokenLosses
from ._normalizer import LossNormalizer
from ._option import option


class SAPO(AbstractPolicyLoss):
    """With the ratio `r` and the advantage `A`, `-sigmoid(t (r - 1)) (4 / t) A`: a soft gate in place of the clip.

    Its slope in `r` is 1 at `r = 1`, and falls off on both sides, the sooner the larger the temperature `t`.

    ??? cite

        Soft adaptive policy optimization, [arXiv:2511.20347](https://arxiv.org/abs/2511.20347).
    """

    traits: ClassVar[LossTraits] = LossTraits()

    sapo_temperature_pos: Float[Array, ""] = option(1.0, "temperature of tokens with a positive advantage", gt=0)
    sapo_temperature_neg: Float[Array, ""] = option(1.05, "temperature of the other tokens", gt=0)

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        temperature = jnp.where(tokens.advantages > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
        gate = jax.nn.sigmoid(temperature * (tokens.ratio - 1)) * 4 / temperature
        return TokenLosses(-gate * tokens.advantages, {})

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return sequence_mean(token_losses, completion_mask, normalizer)
