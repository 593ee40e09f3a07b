"""All that a run carries from step to step: what a checkpoint holds."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..drafts import AbstractDraft
from ..models import AbstractLanguageModel


class RunState(eqx.Module):
    """Weights and optimizers, float32.

    The step is not in it: random numbers and the data cursor are functions of the seed and the step alone.

    **Arguments:**

    - `policy`, `policy_optimizer`: master weights and the optimizer's state.
    - `draft`, `draft_optimizer`: the same for the draft; `NoDraft` has no arrays.
    - `draft_acceptance`: expected acceptance of each draft position at the draft's last update, for losses and draft
        lengths that adapt to it; zeros before the first.
    """

    policy: AbstractLanguageModel
    policy_optimizer: Any
    draft: AbstractDraft
    draft_optimizer: Any
    draft_acceptance: Float[Array, " draft"]

    @staticmethod
    def fresh(
        policy: AbstractLanguageModel,
        draft: AbstractDraft,
        policy_optimizer: optax.GradientTransformation,
        draft_optimizer: optax.GradientTransformation,
    ) -> "RunState":
        """The state before the first step."""
        return RunState(
            policy,
            policy_optimizer.init(eqx.filter(policy, eqx.is_inexact_array)),
            draft,
            draft_optimizer.init(eqx.filter(draft, eqx.is_inexact_array)),
            jnp.zeros(draft.train_length),
        )

    @staticmethod
    def frozen_policy(
        policy: AbstractLanguageModel, draft: AbstractDraft, draft_optimizer: optax.GradientTransformation
    ) -> "RunState":
        """The state before a draft's first update, for a policy that stands still: it has no optimizer."""
        return RunState(
            policy,
            None,
            draft,
            draft_optimizer.init(eqx.filter(draft, eqx.is_inexact_array)),
            jnp.zeros(draft.train_length),
        )

    def trees(self) -> dict[str, Any]:
        """By name, as a checkpoint keeps them."""
        return {
            "policy": self.policy,
            "policy_optimizer": self.policy_optimizer,
            "draft": self.draft,
            "draft_optimizer": self.draft_optimizer,
            "draft_acceptance": self.draft_acceptance,
        }

    @staticmethod
    def from_trees(trees: dict[str, Any]) -> "RunState":
        """The inverse of `trees`."""
        return RunState(**trees)
