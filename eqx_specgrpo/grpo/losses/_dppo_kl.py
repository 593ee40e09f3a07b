from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._base import LossTraits, TokenInputs
from ._dppo import AbstractDPPO
from ._option import option


def binary_kl(old_logprobs: Float[Array, "*shape"], logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """KL(old || new) of "this token or another", from the token's two log-probabilities.

    `m log(m / p) + (1 - m) log((1 - m) / (1 - p))`, with `m` and `p` the probabilities under old and new.

    ??? cite

        [arXiv:2602.04879](https://arxiv.org/abs/2602.04879), the binary approximation.
    """
    old, old_rest, rest = jnp.exp(old_logprobs), -jnp.expm1(old_logprobs), -jnp.expm1(logprobs)
    # A probability of 1 leaves nothing to the other tokens: 0 log 0 is 0, and the other way round is very far.
    tiny = jnp.finfo(jnp.float32).tiny
    gap = jnp.log(jnp.maximum(old_rest, tiny)) - jnp.log(jnp.maximum(rest, tiny))
    return old * (old_logprobs - logprobs) + old_rest * gap


class DPPOKL(AbstractDPPO):
    """DPPO whose trust region bounds the KL of "this token or another" from the sampler.

    ??? cite

        [arXiv:2602.04879](https://arxiv.org/abs/2602.04879).
    """

    traits: ClassVar[LossTraits] = LossTraits(levels=("token",), correction_modes=())

    dppo_delta: Float[Array, ""] = option(0.05, "KL that a token may move by; none: 0.05", gt=0)
    dppo_delta_high: Float[Array, ""] | None = option(None, "the same, of one that rises; none: dppo_delta", gt=0)

    def outside(self, tokens: TokenInputs) -> tuple[Bool[Array, "rows new"], Bool[Array, "rows new"]]:
        kl = binary_kl(tokens.old_logprobs, tokens.logprobs)
        high = self.dppo_delta if self.dppo_delta_high is None else self.dppo_delta_high
        return (kl > self.dppo_delta) & (tokens.log_ratio < 0), (kl > high) & (tokens.log_ratio > 0)
