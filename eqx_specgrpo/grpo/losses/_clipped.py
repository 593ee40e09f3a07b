"""PPO's clipped surrogate, which several losses have in common and average differently."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import AbstractPolicyLoss, TokenInputs, TokenLosses
from ._option import option


def _below_the_clip(delta: float, options: Mapping[str, float | None]) -> str | None:
    high = options["epsilon"] if options["epsilon_high"] is None else options["epsilon_high"]
    if high is None or delta > 1 + high:
        return None
    return (
        f"grpo.delta = {delta} must be greater than 1 + epsilon_high = {1 + high}: below that it would override the "
        "ordinary clipping"
    )


class AbstractClipped(AbstractPolicyLoss):
    """With the ratio `r` and the advantage `A`, `-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`.

    With `delta`, the unclipped branch is `min(r, delta) A`: the loss is bounded where the advantage is negative, too.

    ??? cite

        PPO [arXiv:1707.06347](https://arxiv.org/abs/1707.06347), equation 7; `epsilon_high`: DAPO
        [arXiv:2503.14476](https://arxiv.org/abs/2503.14476), section 3.1; `delta`: INTELLECT-2
        [arXiv:2505.07291](https://arxiv.org/abs/2505.07291).
    """

    epsilon: Float[Array, ""] = option(0.2, "the ratio is clipped below at 1 - epsilon", gt=0, le=1)
    epsilon_high: Float[Array, ""] | None = option(
        None, "the ratio is clipped above at 1 + epsilon_high; none: epsilon", gt=0
    )
    delta: Float[Array, ""] | None = option(
        None,
        "upper bound of the ratio where the advantage is negative (two-sided clipping); none: off",
        gt=1,
        complaint=_below_the_clip,
    )

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        ratio, advantages = tokens.ratio, tokens.advantages
        epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        clipped = jnp.clip(ratio, 1 - self.epsilon, 1 + epsilon_high)
        unclipped = ratio if self.delta is None else jnp.minimum(ratio, self.delta)
        low = (ratio < 1 - self.epsilon) & (advantages < 0)
        high = (ratio > 1 + epsilon_high) & (advantages > 0)
        return TokenLosses(
            -jnp.minimum(unclipped * advantages, clipped * advantages),
            {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high},
        )
