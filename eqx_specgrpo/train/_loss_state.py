"""What the policy's loss carries from step to step: a reference that follows the policy, and the entropy bonus."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..config import RunParts
from ..grpo import EntropyState, compute_copy
from ..models import AbstractLanguageModel, AdaptedTransformer
from ._state import RunState


def fixed_reference(parts: RunParts, policy: AbstractLanguageModel) -> AbstractLanguageModel | None:
    """The policy as it begins, in the dtype of computation; only where the loss asks for it, and it stands still.

    A policy with adapters is its own reference, without them: see [`current_reference`][].
    """
    grpo = parts.config.grpo
    if isinstance(policy, AdaptedTransformer):
        return None
    if grpo.beta == 0 or grpo.sync_ref_model:
        return None
    return compute_copy(policy, parts.config.model.dtype, parts.mesh)


def with_loss_state(parts: RunParts, state: RunState) -> RunState:
    """The state before step 0 with what the loss will carry: what does not change is not in it."""
    grpo = parts.config.grpo
    return dataclasses.replace(
        state,
        reference=_copied(state.policy) if grpo.sync_ref_model else None,
        entropy=parts.entropy.init() if grpo.use_adaptive_entropy else None,
    )


def _copied(model: AbstractLanguageModel) -> AbstractLanguageModel:
    # The policy's own arrays are donated.
    return jax.tree.map(lambda x: jnp.array(x, copy=True) if eqx.is_array(x) else x, model)


def current_reference(
    parts: RunParts, state: RunState, fixed: AbstractLanguageModel | None
) -> AbstractLanguageModel | None:
    """The reference of a step, in the dtype of computation: the base of a policy with adapters, the one that follows
    the policy, or else `fixed`."""
    if isinstance(state.policy, AdaptedTransformer):
        return state.policy.base_in(jnp.dtype(parts.config.model.dtype)) if parts.config.grpo.beta != 0 else None
    if state.reference is None:
        return fixed
    return compute_copy(state.reference, parts.config.model.dtype, parts.mesh)


def with_update(
    parts: RunParts,
    state: RunState,
    policy: AbstractLanguageModel,
    optimizer_state: Any,
    entropy: EntropyState,
    done: int,
) -> RunState:
    """The state after `done` steps: the policy's update, and what follows from it.

    ??? cite

        The reference that follows: TR-DPO, [arXiv:2404.09656](https://arxiv.org/abs/2404.09656); names and defaults as
        in TRL.
    """
    grpo, reference = parts.config.grpo, state.reference
    if reference is not None and done % grpo.ref_model_sync_steps == 0:
        reference = _mixed(policy, reference, jnp.float32(grpo.ref_model_mixup_alpha))
    return dataclasses.replace(
        state,
        policy=policy,
        policy_optimizer=optimizer_state,
        reference=reference,
        entropy=None if state.entropy is None else entropy,
    )


@eqx.filter_jit
def _mixed(
    policy: AbstractLanguageModel, reference: AbstractLanguageModel, alpha: Float[Array, ""]
) -> AbstractLanguageModel:
    new, rest = eqx.partition(policy, eqx.is_inexact_array)
    old = eqx.filter(reference, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda new, old: alpha * new + (1 - alpha) * old, new, old), rest)
