from typing import ClassVar

from jaxtyping import Array, Bool, Float

from ._average import constant_mean
from ._base import LossTraits
from ._clipped import AbstractClipped
from ._normalizer import LossNormalizer


class DrGRPO(AbstractClipped):
    """The clipped surrogate, divided by a constant, so that length is not rewarded.

    ??? cite

        Dr. GRPO, [arXiv:2503.20783](https://arxiv.org/abs/2503.20783).
    """

    traits: ClassVar[LossTraits] = LossTraits()

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return constant_mean(token_losses, completion_mask, normalizer)
