import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._base import AbstractDraftLoss
from ._draft_loss_kind import DraftLossKind
from ._losses import total_variation


class EndToEndTV(AbstractDraftLoss):
    """The share of a drafted chain that is rejected: position `j` is accepted only if all before it are.

    The loss of draft position `j` is `1 - prod_{i <= j} sum min(p_i, q_i)`; its mean over draft positions is the
    end-to-end total variation of Bebop. Early positions weigh more by themselves, so no further decay is needed. For
    drafts that are already aligned: the gradient vanishes with the acceptance. A position that the mask rules out
    counts as accepted in the products of later ones.

    The prefixes are those of the rollout, not of the draft, so this predicts rather than measures acceptance.
    """

    def position_losses(
        self,
        target_logits: Float[Array, "positions draft vocab"],
        draft_logits: Float[Array, "positions draft vocab"],
        mask: Bool[Array, "positions draft"],
        alpha: Float[Array, " draft"],
    ) -> Float[Array, "positions draft"]:
        acceptances = jnp.where(mask, 1 - total_variation(target_logits, draft_logits), 1.0)
        return 1 - jnp.cumprod(acceptances, axis=1)


LOSS = DraftLossKind(EndToEndTV(), "the rejected share of a whole chain, for drafts that are aligned already")
