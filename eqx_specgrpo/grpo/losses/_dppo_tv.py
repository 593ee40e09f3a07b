from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._base import LossTraits, TokenInputs
from ._dppo import AbstractDPPO
from ._option import option


class DPPOTV(AbstractDPPO):
    """DPPO whose trust region bounds the change of the token's probability: the total variation of "this token or
    another".

    ??? cite

        [arXiv:2602.04879](https://arxiv.org/abs/2602.04879).
    """

    traits: ClassVar[LossTraits] = LossTraits(levels=("token",), correction_modes=())

    dppo_delta: Float[Array, ""] = option(0.2, "a token's probability may move by so much; none: 0.2", gt=0)
    dppo_delta_high: Float[Array, ""] | None = option(None, "the same, of one that rises; none: dppo_delta", gt=0)

    def outside(self, tokens: TokenInputs) -> tuple[Bool[Array, "rows new"], Bool[Array, "rows new"]]:
        moved = jnp.exp(tokens.logprobs) - jnp.exp(tokens.old_logprobs)
        return moved < -self.dppo_delta, moved > (
            self.dppo_delta if self.dppo_delta_high is None else self.dppo_delta_high
        )
