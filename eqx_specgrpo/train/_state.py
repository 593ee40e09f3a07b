"""All that a run carries from step to step: what a checkpoint holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..drafts import AbstractDraft
from ..grpo import EntropyState, RowFeatures, UpdateBatch, trained_part, with_trained_part
from ..layout import AbstractDeviceMesh, Layout
from ..models import AbstractLanguageModel
from ._lesson_budget import LessonState


class RunState(eqx.Module):
    """Weights and optimizers, float32, and the place in the data.

    The step is not in it: random numbers are functions of the seed and the step alone.

    **Arguments:**

    - `policy`, `policy_optimizer`: master weights and the optimizer's state. Of a policy with adapters, the optimizer
        and a checkpoint know these alone.
    - `draft`, `draft_optimizer`: the same for the draft; `NoDraft` has no arrays.
    - `draft_acceptance`: expected acceptance of each draft position at the draft's last update, for losses and draft
        lengths that adapt to it; zeros before the first.
    - `reference`: what the KL is measured from, where it follows the policy; `None` where it stands still, or there is
        none.
    - `entropy`: of the controller of the entropy bonus; `None` where the bonus does not change.
    - `order`: what the order of the items has learned of them; without arrays where it learns nothing.
    - `position`: how many items of the task's stream are done with.
    - `lessons`: what decides how many lessons the draft gets.
    """

    policy: AbstractLanguageModel
    policy_optimizer: Any
    draft: AbstractDraft
    draft_optimizer: Any
    draft_acceptance: Float[Array, " draft"]
    reference: AbstractLanguageModel | None = None
    entropy: EntropyState | None = None
    order: Any = None
    position: int = 0
    lessons: LessonState = LessonState()

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
            policy_optimizer.init(eqx.filter(trained_part(policy), eqx.is_inexact_array)),
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

    def laid_out(self, mesh: AbstractDeviceMesh) -> "RunState":
        """The same numbers, each device with its part of weights and optimizers."""
        names = ("policy", "policy_optimizer", "draft", "draft_optimizer", "reference")
        old = (self.policy, self.policy_optimizer, self.draft, self.draft_optimizer, self.reference)
        return dataclasses.replace(self, **dict(zip(names, mesh.lay_out(old, Layout.MASTER), strict=True)))

    def trees(self) -> dict[str, Any]:
        """By name, as a checkpoint keeps them: what there is."""
        optional = {"reference": self.reference, "entropy": self.entropy, "order": self.order or None}
        return {
            "policy": trained_part(self.policy),
            "policy_optimizer": self.policy_optimizer,
            "draft": self.draft,
            "draft_optimizer": self.draft_optimizer,
            "draft_acceptance": self.draft_acceptance,
            **{name: tree for name, tree in optional.items() if tree is not None},
        }

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint keeps beside them."""
        return {"position": self.position, "lessons": self.lessons.numbers()}

    def with_numbers(self, numbers: Mapping[str, Any], step: int, prompts_per_step: int) -> "RunState":
        """The inverse of `numbers`; checkpoints of earlier versions lack some.

        **Arguments:**

        - `numbers`: what a checkpoint keeps beside its trees.
        - `step`, `prompts_per_step`: steps that are done, and prompts of each.
        """
        position = numbers.get("position", step * prompts_per_step)
        lessons = LessonState.of_numbers(numbers["lessons"]) if "lessons" in numbers else LessonState(step=step)
        return dataclasses.replace(self, position=position, lessons=lessons)

    def with_trees(self, trees: dict[str, Any]) -> "RunState":
        """The inverse of `trees`; a base that does not change stays this state's."""
        return dataclasses.replace(self, **{**trees, "policy": with_trained_part(self.policy, trees["policy"])})


class PolicyUpdate(NamedTuple):
    """What comes of a step's update of the policy.

    **Arguments:**

    - `policy`, `optimizer_state`: after it.
    - `weights`, `features`: of the last forward, for the draft to learn from.
    - `batch`: what was learned from.
    - `metrics`: by name.
    - `entropy`: the state of the entropy bonus's controller.
    """

    policy: AbstractLanguageModel
    optimizer_state: Any
    weights: AbstractLanguageModel
    features: RowFeatures
    batch: UpdateBatch
    metrics: dict[str, float]
    entropy: EntropyState
