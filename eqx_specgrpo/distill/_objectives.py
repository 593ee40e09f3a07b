"""Draft losses as objects: one interface, so that a run can choose."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ._losses import expected_acceptance, forward_kl, lk_hybrid, reverse_kl, sayable, total_variation


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
