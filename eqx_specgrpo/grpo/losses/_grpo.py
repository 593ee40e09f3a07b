from typing import ClassVar

from jaxtyping import Array, Bool, Float

from ._average import sequence_mean
from ._base import LossTraits
from ._clipped import AbstractClipped
from ._normalizer import LossNormalizer


class GRPO(AbstractClipped):
    """The clipped surrogate, averaged over each completion, then over completions.

    At the level of sequences (`importance_sampling_level="sequence"`) this is GSPO,
    [arXiv:2507.18071](https://arxiv.org/abs/2507.18071).

    ??? cite

        DeepSeekMath, [arXiv:2402.03300](https://arxiv.org/abs/2402.03300), section 4.1.
    """

    traits: ClassVar[LossTraits] = LossTraits()

    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        return sequence_mean(token_losses, completion_mask, normalizer)
