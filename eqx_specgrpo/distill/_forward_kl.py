from jaxtyping import Array, Bool, Float

from ._base import AbstractDraftLoss
from ._draft_loss_kind import DraftLossKind
from ._losses import forward_kl, sayable


class ForwardKL(AbstractDraftLoss):
    """KL(target || draft): robust from a random start. See [`eqx_specgrpo.distill.forward_kl`][].

    For a draft of a reduced vocabulary, of the target renormalised over what the draft can say.
    """

    def position_losses(
        self,
        target_logits: Float[Array, "positions draft vocab"],
        draft_logits: Float[Array, "positions draft vocab"],
        mask: Bool[Array, "positions draft"],
        alpha: Float[Array, " draft"],
    ) -> Float[Array, "positions draft"]:
        return forward_kl(sayable(target_logits, draft_logits), draft_logits)


LOSS = DraftLossKind(ForwardKL(), "forward KL, robust from a random start")
