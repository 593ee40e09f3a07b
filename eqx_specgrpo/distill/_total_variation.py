from jaxtyping import Array, Bool, Float

from ._base import AbstractDraftLoss
from ._draft_loss_kind import DraftLossKind
from ._losses import total_variation


class TotalVariation(AbstractDraftLoss):
    """The rejection probability, for a draft already aligned. See [`eqx_specgrpo.distill.total_variation`][]."""

    def position_losses(
        self,
        target_logits: Float[Array, "positions draft vocab"],
        draft_logits: Float[Array, "positions draft vocab"],
        mask: Bool[Array, "positions draft"],
        alpha: Float[Array, " draft"],
    ) -> Float[Array, "positions draft"]:
        return total_variation(target_logits, draft_logits)


LOSS = DraftLossKind(TotalVariation(), "total variation, for drafts that are aligned already")
