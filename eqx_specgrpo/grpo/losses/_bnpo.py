from typing import ClassVar

from jaxtyping import Array, Bool, Float

from ._average import micro_batch_mean
from ._base import LossTraits
from ._clipped import AbstractClipped
from ._normalizer import LossNormalizer


class BNPO(AbstractClipped):
    """The clipped surrogate, averaged over the tokens of each micro-batch. TRL's name."""

    traits: ClassVar[LossTraits] = LossTraits(depends_on_micro_batches=True)

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return micro_batch_mean(token_losses, completion_mask, normalizer)
