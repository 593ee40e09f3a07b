from typing import ClassVar

from jaxtyping import Array, Bool, Float

from ._average import sequence_sum
from ._base import LossTraits
from ._clipped import AbstractClipped
from ._normalizer import LossNormalizer


class LUSPO(AbstractClipped):
    """GSPO's clipped surrogate with each completion weighed by its length, so that long ones are not discounted.

    ??? cite

        Length-unbiased sequence policy optimization, [arXiv:2602.05261](https://arxiv.org/abs/2602.05261).
    """

    traits: ClassVar[LossTraits] = LossTraits(levels=("sequence",))

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return sequence_sum(token_losses, completion_mask, normalizer)
