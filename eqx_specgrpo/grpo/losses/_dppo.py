"""A trust region on how far a token's probability has moved, rather than on its ratio."""

import abc

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ._average import token_mean
from ._base import AbstractPolicyLoss, TokenInputs, TokenLosses
from ._normalizer import LossNormalizer


class AbstractDPPO(AbstractPolicyLoss):
    """With the ratio `r` to the *sampler* and the advantage `A`, `-r A` for tokens in the trust region, else 0.

    A token is outside where its probability has moved too far in the direction that its advantage pushes it in. What
    the sampler stored is all that is compared with: no forward of the old policy is needed.

    ??? cite

        Divergence proximal policy optimization, [arXiv:2602.04879](https://arxiv.org/abs/2602.04879).
    """

    @abc.abstractmethod
    def outside(self, tokens: TokenInputs) -> tuple[Bool[Array, "rows new"], Bool[Array, "rows new"]]:
        """Which tokens' probabilities have fallen too far, and risen too far, whatever their advantage."""

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        fallen, risen = self.outside(lax.stop_gradient(tokens))
        low, high = fallen & (tokens.advantages < 0), risen & (tokens.advantages > 0)
        losses = jnp.where(low | high, 0.0, -tokens.ratio * tokens.advantages)
        metrics = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
        return TokenLosses(losses, metrics)

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return token_mean(token_losses, completion_mask, normalizer)
