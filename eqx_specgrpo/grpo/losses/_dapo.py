from typing import ClassVar

from jaxtyping import Array, Bool, Float

from ._average import token_mean
from ._base import LossTraits
from ._clipped import AbstractClipped
from ._normalizer import LossNormalizer


class DAPO(AbstractClipped):
    """The clipped surrogate, averaged over all tokens of the step.

    ??? cite

        [arXiv:2503.14476](https://arxiv.org/abs/2503.14476), section 3.
    """

    traits: ClassVar[LossTraits] = LossTraits()

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return token_mean(token_losses, completion_mask, normalizer)
