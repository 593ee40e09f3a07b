from jaxtyping import Array, Bool, Float

from ._base import AbstractDraftLoss
from ._draft_loss_kind import DraftLossKind
from ._losses import reverse_kl


class ReverseKL(AbstractDraftLoss):
    """KL(draft || target): seeks modes. See [`eqx_specgrpo.distill.reverse_kl`][]."""

    def position_losses(
        self,
        target_logits: Float[Array, "positions draft vocab"],
        draft_logits: Float[Array, "positions draft vocab"],
        mask: Bool[Array, "positions draft"],
        alpha: Float[Array, " draft"],
    ) -> Float[Array, "positions draft"]:
        return reverse_kl(target_logits, draft_logits)


LOSS = DraftLossKind(ReverseKL(), "reverse KL, which seeks modes")
