"""From a configuration to the objects of a run. The only place that turns names into classes."""

import equinox as eqx
import jax.random as jr
import numpy as np
import optax

from ..decoding import (
    AbstractLengthController,
    AbstractVerifier,
    AdaptiveLength,
    FixedLength,
    make_verifier,
)
from ..distill import AbstractDraftLoss, make_draft_loss
from ..drafts import (
    DRAFT_KINDS,
    AbstractDraft,
    AbstractHistoryDraft,
    FallbackDraft,
    FullVocabulary,
    NoDraft,
    ReducedVocabulary,
    TemperedDraft,
    check_fit,
    draft_vocabulary,
    fresh_draft,
    has_vocabulary,
    load_draft,
    most_used_tokens,
    tempered_part,
    with_vocabulary,
)
from ..errors import UserError
from ..files import user_path
from ..grpo import AbstractEntropyControl, LossSettings, adamw
from ..models import AbstractLanguageModel, Tokenizer
from ..sampling import AbstractSampling, TruncatedSampling
from ..tasks import ORDERS, AbstractOrder, AbstractTask, Rewards
from ._check import check_saved_draft, default_model_path, load_split, load_task_and_rewards
from ._draft_options import LOOKUP, split_options
from ._load import draft_config
from ._lora import merged_policy, starting_policy
from ._loss import entropy_control, loss_settings
from ._sampling import rollout_sampling
from ._tree import DraftConfig, RunConfig

# Of a fresh draft for a model with more than twice as many tokens: drafting from 49,152 took eight times as long as
# from 4,096, learning six times (docs/experiments.md).
_DEFAULT_VOCABULARY = 8192
_DRAFT_WEIGHTS = 0x68656164  # apart from the steps' keys, which are folded in by small numbers


class RunParts(eqx.Module):
    """What a run is made of; nothing in it changes from step to step."""

    config: RunConfig
    tokenizer: Tokenizer
    task: AbstractTask
    rewards: Rewards
    order: AbstractOrder
    sampling: AbstractSampling
    verifier: AbstractVerifier
    length: AbstractLengthController
    loss: LossSettings
    entropy: AbstractEntropyControl
    draft_loss: AbstractDraftLoss
    policy_optimizer: optax.GradientTransformation
    draft_optimizer: optax.GradientTransformation

    @property
    def truncation(self) -> TruncatedSampling | None:
        """How tokens are drawn, where that is from a part of the vocabulary."""
        return self.sampling if isinstance(self.sampling, TruncatedSampling) else None


def load_policy(path: str, adapter: str | None = None) -> tuple[AbstractLanguageModel, Tokenizer]:
    """Model and tokenizer in float32; the embedded default for an empty path.

    **Arguments:**

    - `adapter`: a folder in PEFT's format, to be merged into the weights.
    """
    return merged_policy(path or default_model_path(), adapter)


def load_trained_policy(config: RunConfig) -> tuple[AbstractLanguageModel, Tokenizer]:
    """What a run trains: the model, or, with a `lora.rank`, a base that stands still and its adapters."""
    model, path = config.model, config.model.path or default_model_path()
    return starting_policy(path, model.adapter, config.lora, model.base_dtype, config.seed)


def model_name(config: RunConfig) -> str:
    """What to call the target in messages and in what is written."""
    return config.model.path or "the embedded default model"


def draft_spec(config: DraftConfig) -> str | None:
    """How a class of the user's own is found, for a saved draft; `None` for the library's kinds."""
    return None if config.kind in DRAFT_KINDS else config.kind


def make_draft(
    config: DraftConfig, target: AbstractLanguageModel, seed: int = 0, tokenizer: Tokenizer | None = None
) -> AbstractDraft:
    """The draft that a run starts with.

    **Arguments:**

    - `config`: which.
    - `target`: whom it is to draft for.
    - `seed`: for fresh weights.
    - `tokenizer`: the target's, to which that of another model is compared.

    **Raises:**

    `UserError` if a saved draft or a class can't be loaded, or the draft does not fit the target.
    """
    if not config.enabled:
        return NoDraft()
    key = jr.fold_in(jr.key(seed), _DRAFT_WEIGHTS)
    own, lookup = split_options(config.kind, config.ngram, config.options) if config.options else ({}, {})
    if config.path is not None:
        draft = _saved_draft(config, target)
    else:
        draft = fresh_draft(config.kind, target, config.max_length, options=own, tokenizer=tokenizer, key=key)
    size = config.vocabulary
    if size is None and config.path is None and has_vocabulary(draft) and target.vocab_size > 2 * _DEFAULT_VOCABULARY:
        size = _DEFAULT_VOCABULARY
    if size is not None and size != draft_vocabulary(draft).size:
        draft = _of_other_vocabulary(draft, size, target, tokenizer)
    if config.fit_temperature and draft.train_length > 0 and tempered_part(draft) is None:
        is_fallback = isinstance(draft, FallbackDraft)
        draft = FallbackDraft(draft.first, TemperedDraft(draft.then)) if is_fallback else TemperedDraft(draft)
    if config.ngram and not isinstance(draft, FallbackDraft):
        # In front of another draft: there a short match is often worse than what the other one says.
        lookup = {"min_ngram": 3, **{name: value for name, value in lookup.items() if value != "none"}}
        first = fresh_draft(LOOKUP, target, config.max_length, options=lookup, key=key)
        assert isinstance(first, AbstractHistoryDraft)
        draft = FallbackDraft(first, draft)
    check_fit(draft, target)
    return draft


def _of_other_vocabulary(
    draft: AbstractDraft, size: int, target: AbstractLanguageModel, tokenizer: Tokenizer | None
) -> AbstractDraft:
    """The draft with as many tokens: what it had goes first, then the end of a sequence, then the lowest ids, until
    completions have shown better."""
    if size == 0:
        return with_vocabulary(draft, FullVocabulary())
    if size > target.vocab_size:
        raise UserError(
            f"draft.vocabulary = {size}, but the model's has only {target.vocab_size} tokens: set a smaller one, or 0 "
            "for all of them"
        )
    old = draft_vocabulary(draft).support
    first = [] if old is None else np.asarray(old).tolist()
    ends = () if tokenizer is None else tokenizer.eos_ids
    ids = most_used_tokens(np.zeros(0, int), size, target.vocab_size, [*first, *ends][:size])
    return with_vocabulary(draft, ReducedVocabulary(ids))


def _saved_draft(config: DraftConfig, target: AbstractLanguageModel) -> AbstractDraft:
    check_saved_draft(config)
    assert config.path is not None
    draft = load_draft(user_path(config.path), target)
    return draft.then if isinstance(draft, FallbackDraft) and not config.ngram else draft


def named_draft(
    text: str, target: AbstractLanguageModel, tokenizer: Tokenizer | None = None, seed: int = 0
) -> AbstractDraft:
    """The draft that `--draft` names: a saved one's folder, a kind, or a class as `file.py:Class`."""
    return make_draft(draft_config(text), target, seed, tokenizer)


def make_parts(config: RunConfig, tokenizer: Tokenizer, draft: AbstractDraft, *, with_rewards: bool = True) -> RunParts:
    """Everything but the weights. Distilling a draft needs no rewards: without them, every completion is worth 0."""
    if with_rewards:
        task, rewards = load_task_and_rewards(config)
    else:
        task, _ = load_split(config)
        rewards = Rewards(("none",), (lambda completions, **_: [0.0] * len(completions),), (1.0,))
    grpo = config.grpo
    return RunParts(
        config=config,
        tokenizer=tokenizer,
        task=task,
        rewards=rewards,
        order=ORDERS[config.curriculum],
        sampling=rollout_sampling(grpo),
        verifier=make_verifier(config.draft.verifier),
        length=_length(config.draft),
        loss=loss_settings(grpo, draft.layers),
        entropy=entropy_control(grpo),
        draft_loss=make_draft_loss(config.draft.loss),
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


def _length(config: DraftConfig) -> AbstractLengthController:
    if not config.enabled:
        return FixedLength(0)
    return AdaptiveLength(config.length) if config.adaptive else FixedLength(config.length)


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


def rate_advice(old: RunConfig, new: RunConfig, done: int) -> str | None:
    """What to know of the learning rate of a run that goes on with another number of steps, if it changes.

    **Arguments:**

    - `done`: steps that are done.
    """
    before, after = learning_rate(old, max(done - 1, 0)), learning_rate(new, done)
    if old.steps == new.steps or done == new.steps or after <= before:
        return None
    return (
        f"the learning rate goes back up: it was {before:.3g} at step {done} of {old.steps} and is {after:.3g} at step "
        f"{done + 1} of {new.steps}, since it falls linearly to 0 at the last step. For a rate that does not depend on "
        'steps, start a run with grpo.lr_scheduler_type = "constant"'
    )
