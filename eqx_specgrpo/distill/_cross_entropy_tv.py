import equinox as eqx
from jaxtyping import Array, Bool, Float

from ._base import AbstractDraftLoss
from ._draft_loss_kind import DraftLossKind
from ._losses import forward_kl, sayable, total_variation


class CrossEntropyTV(AbstractDraftLoss):
    """A little cross-entropy beside the rejection probability: `share CE + (1 - share) TV`.

    The cross-entropy is that with the target's whole distribution, less its entropy, which is constant: the forward KL
    ([`eqx_specgrpo.distill.forward_kl`][]). It keeps a gradient where the two distributions hardly overlap, and the
    variation takes over where they do. Draft positions weigh less and less: `position_decay` of
    [`eqx_specgrpo.distill.draft_gradients`][] is the `exp(-1/gamma)` of the paper.

    ??? cite

        DSpark, [arXiv:2607.05147](https://arxiv.org/abs/2607.05147).

    **Arguments:**

    - `share`: of the cross-entropy.
    """

    share: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}: it is the cross-entropy's part of the loss, from 0 to 1")

    def position_losses(
        self,
        target_logits: Float[Array, "positions draft vocab"],
        draft_logits: Float[Array, "positions draft vocab"],
        mask: Bool[Array, "positions draft"],
        alpha: Float[Array, " draft"],
    ) -> Float[Array, "positions draft"]:
        divergence = forward_kl(sayable(target_logits, draft_logits), draft_logits)
        return self.share * divergence + (1 - self.share) * total_variation(target_logits, draft_logits)


LOSS = DraftLossKind(CrossEntropyTV(share=0.1), "a tenth cross-entropy, nine tenths total variation")
