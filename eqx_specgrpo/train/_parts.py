"""From a configuration to the objects of a run. The only place that turns names into classes."""

from importlib import resources
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optax

from .._errors import UserError
from .._sampling import AbstractSampling, Sampling
from ..decoding import AbstractLengthController, AbstractVerifier, Block, FixedLength, Rejection
from ..distill import AbstractDraftLoss, ForwardKL, LKHybrid
from ..drafts import AbstractDraft, DraftError, HydraHeads, MedusaHeads, NoDraft, draft_kind, load_draft
from ..grpo import LossSettings, adamw
from ..models import AbstractLanguageModel, Tokenizer, load_pretrained
from ..tasks import AbstractTask, Rewards
from ._check import load_task_and_rewards
from ._config import DraftConfig, RunConfig

_DRAFT_WEIGHTS = 0x68656164  # apart from the steps' keys, which are folded in by small numbers


class RunParts(eqx.Module):
    """What a run is made of; nothing in it changes from step to step."""

    config: RunConfig
    tokenizer: Tokenizer
    task: AbstractTask
    rewards: Rewards
    sampling: AbstractSampling
    verifier: AbstractVerifier
    length: AbstractLengthController
    loss: LossSettings
    draft_loss: AbstractDraftLoss
    policy_optimizer: optax.GradientTransformation
    draft_optimizer: optax.GradientTransformation


def default_model_path() -> Path:
    """The folder of the embedded default model."""
    return Path(str(resources.files("eqx_specgrpo") / "assets" / "default_model"))


def load_policy(path: str) -> tuple[AbstractLanguageModel, Tokenizer]:
    """Model and tokenizer in float32; the embedded default for an empty path."""
    return load_pretrained(path or default_model_path())


def make_draft(config: DraftConfig, target: AbstractLanguageModel, seed: int = 0) -> AbstractDraft:
    """The draft that a run starts with; `seed` is for fresh weights."""
    if not config.enabled:
        return NoDraft()
    if config.path is not None:
        draft = load_draft(Path(config.path), target)
        if draft_kind(draft) != config.kind:
            raise DraftError(
                f"the draft in {config.path} is of kind {draft_kind(draft)!r}, but draft.kind is {config.kind!r}: "
                f"set draft.kind={draft_kind(draft)}, or name another draft"
            )
        if draft.max_length != config.heads:
            raise DraftError(
                f"the draft in {config.path} has {draft.max_length} heads, but draft.heads is {config.heads}: set "
                f"draft.heads={draft.max_length} (and a draft.length of at most that), or name another draft"
            )
        return draft
    match config.kind:
        case "medusa":
            return MedusaHeads.fresh(target.hidden_size, config.heads)
        case "hydra":
            return HydraHeads(target.hidden_size, config.heads, key=jr.fold_in(jr.key(seed), _DRAFT_WEIGHTS))
        case "none":
            return NoDraft()


def make_parts(config: RunConfig, tokenizer: Tokenizer, draft: AbstractDraft) -> RunParts:
    """Everything but the weights."""
    task, rewards = load_task_and_rewards(config)
    grpo = config.grpo
    match config.draft.loss:
        case "kl":
            draft_loss = ForwardKL()
        case "hybrid":
            draft_loss = LKHybrid(eta=10.0)
    return RunParts(
        config=config,
        tokenizer=tokenizer,
        task=task,
        rewards=rewards,
        sampling=Sampling(jnp.float32(grpo.temperature)),
        verifier=_verifier(config.draft.verifier),
        length=FixedLength(config.draft.length if config.draft.enabled else 0),
        loss=LossSettings(
            temperature=grpo.temperature,
            epsilon=grpo.epsilon,
            epsilon_high=grpo.epsilon_high,
            delta=grpo.delta,
            beta=grpo.beta,
            loss_type=grpo.loss_type,
            chunk=grpo.logprob_chunk,
            layers=draft.layers,
        ),
        draft_loss=draft_loss,
        policy_optimizer=adamw(
            beta1=grpo.adam_beta1,
            beta2=grpo.adam_beta2,
            epsilon=grpo.adam_epsilon,
            weight_decay=grpo.weight_decay,
            max_grad_norm=grpo.max_grad_norm,
        ),
        draft_optimizer=adamw(
            beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, max_grad_norm=config.draft.max_grad_norm
        ),
    )


def _verifier(name: Literal["rejection", "block"]) -> AbstractVerifier:
    match name:
        case "rejection":
            return Rejection()
        case "block":
            return Block()


def check_prompt(prompt_length: int, position: int, target: AbstractLanguageModel, max_new: int) -> None:
    """Raises if a prompt leaves no room for a completion in the model's context."""
    if prompt_length >= target.max_length:
        raise UserError(
            f"the prompt of item {position} has {prompt_length} tokens, but the model's context holds "
            f"{target.max_length}, completion included (grpo.max_completion_length = {max_new}): shorten the prompts, "
            "or use a model with a longer context"
        )


def learning_rate(config: RunConfig, step: int) -> float:
    """The policy's learning rate at a step: warm-up, then constant or linear to 0 at the last step."""
    grpo = config.grpo
    warm = min(1.0, (step + 1) / grpo.warmup_steps) if grpo.warmup_steps else 1.0
    if grpo.lr_scheduler_type == "constant":
        return grpo.learning_rate * warm
    decayed = (config.steps - step) / max(config.steps - grpo.warmup_steps, 1)
    return grpo.learning_rate * min(warm, max(0.0, min(1.0, decayed)))
