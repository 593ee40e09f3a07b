"""What a draft loss is to the draft step."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ._losses import expected_acceptance


class AbstractDraftLoss(eqx.Module):
    """What a draft minimises. Implement `position_losses`; masks and sums are dealt with here."""

    def __call__(
        self,
        target_logits: Float[Array, "positions draft vocab"],
        draft_logits: Float[Array, "positions draft vocab"],
        mask: Bool[Array, "positions draft"],
        alpha: Float[Array, " draft"],
    ) -> tuple[Float[Array, " draft"], Float[Array, " draft"]]:
        """Sums over positions, so that chunks and micro-batches can be added up.

        **Arguments:**

        - `target_logits`: the target's at each position that a draft from here would fill, with the sampling transform
            applied. A constant.
        - `draft_logits`: the draft's, with the same transform.
        - `mask`: `True` where a position counts. Elsewhere the logits may hold anything, NaN included.
        - `alpha`: mean acceptance of each draft position over the batch, of an earlier step or of a first pass; a
            constant. Losses without a use for it ignore it.

        **Returns:**

        The losses, and the expected acceptances (without gradient), summed over the positions that count. Divide by
        `mask.sum(0)`, taken over the whole step.
        """
        # Harmless numbers go in where nothing counts, before any arithmetic: else NaN would reach the gradient.
        target_logits = jnp.where(mask[..., None], lax.stop_gradient(target_logits), 0.0)
        draft_logits = jnp.where(mask[..., None], draft_logits, 0.0)
        losses = self.position_losses(target_logits, draft_logits, mask, lax.stop_gradient(alpha))
        acceptances = expected_acceptance(target_logits, lax.stop_gradient(draft_logits))
        return jnp.where(mask, losses, 0.0).sum(0), jnp.where(mask, acceptances, 0.0).sum(0)

    @abc.abstractmethod
    def position_losses(
        self,
        target_logits: Float[Array, "positions draft vocab"],
        draft_logits: Float[Array, "positions draft vocab"],
        mask: Bool[Array, "positions draft"],
        alpha: Float[Array, " draft"],
    ) -> Float[Array, "positions draft"]:
        """The loss at each position. Arguments as for `__call__`, but the logits are finite where `mask` is `False`,
        and what is returned there is ignored."""
