import equinox as eqx
from jaxtyping import Array, Bool, Float

from ._base import AbstractDraftLoss
from ._draft_loss_kind import DraftLossKind
from ._losses import lk_hybrid


class LKHybrid(AbstractDraftLoss):
    """From KL to total variation as acceptance grows. See [`eqx_specgrpo.distill.lk_hybrid`][].

    **Arguments:**

    - `eta`: how soon the total variation takes over; 10 suits Medusa heads. At 0 this is the forward KL.
    """

    eta: float = eqx.field(static=True, default=10.0)

    def __check_init__(self):
        if not self.eta >= 0:
            raise ValueError(f"eta is {self.eta}: it must be 0 or more, so that the weight of the KL is at most 1")

    def position_losses(
        self,
        target_logits: Float[Array, "positions draft vocab"],
        draft_logits: Float[Array, "positions draft vocab"],
        mask: Bool[Array, "positions draft"],
        alpha: Float[Array, " draft"],
    ) -> Float[Array, "positions draft"]:
        return lk_hybrid(target_logits, draft_logits, alpha, self.eta)


LOSS = DraftLossKind(LKHybrid(eta=10.0), "KL that becomes total variation as acceptance grows")
