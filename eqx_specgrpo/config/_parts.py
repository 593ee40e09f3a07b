"""From a configuration to the objects of a run. The only place that turns names into classes."""

import functools as ft

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from ..decoding import (
    AbstractLengthController,
    AbstractStop,
    AbstractVerifier,
    AdaptiveLength,
    FixedLength,
    make_stop,
    make_verifier,
)
from ..distill import AbstractDraftLoss, make_draft_loss
from ..drafts import (
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
from ..files import is_import_spec, user_path
from ..grpo import AbstractEntropyControl, LossSettings, make_optimizer
from ..layout import AbstractDeviceMesh, AbstractProcesses, OneDevice, OneProcess, make_mesh
from ..models import AbstractLanguageModel, Tokenizer, load_pretrained
from ..sampling import AbstractSampling, TruncatedSampling
from ..tasks import ORDERS, AbstractOrder, AbstractTask, Rewards
from ._check import check_saved_draft, default_model_path, load_split, load_task_and_rewards
from ._draft_options import LOOKUP, split_options
from ._given import NOTHING_GIVEN, Given
from ._given_names import shown_name
from ._grpo import GRPOConfig
from ._load import draft_config
from ._lora import Load, merged_policy, starting_policy
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
    mesh: AbstractDeviceMesh
    tokenizer: Tokenizer
    task: AbstractTask
    rewards: Rewards
    order: AbstractOrder
    sampling: AbstractSampling
    stop: AbstractStop
    verifier: AbstractVerifier
    length: AbstractLengthController
    loss: LossSettings
    entropy: AbstractEntropyControl
    draft_loss: AbstractDraftLoss
    policy_optimizer: optax.GradientTransformation
    draft_optimizer: optax.GradientTransformation
    processes: AbstractProcesses = OneProcess()

    @property
    def truncation(self) -> TruncatedSampling | None:
        """How tokens are drawn, where that is from a part of the vocabulary."""
        return self.sampling if isinstance(self.sampling, TruncatedSampling) else None


def load_policy(
    path: str, adapter: str | None = None, revision: str | None = None
) -> tuple[AbstractLanguageModel, Tokenizer]:
    """Model and tokenizer in float32; the embedded default for an empty path.

    **Arguments:**

    - `adapter`: a folder in PEFT's format, to be merged into the weights.
    - `revision`: of a model by name.
    """
    return merged_policy(_loader(path, revision), adapter)


def run_mesh(config: RunConfig) -> AbstractDeviceMesh:
    """The devices of a run."""
    return make_mesh(config.devices.model)


def load_trained_policy(
    config: RunConfig, given: Given = NOTHING_GIVEN, mesh: AbstractDeviceMesh = OneDevice()
) -> tuple[AbstractLanguageModel, Tokenizer]:
    """What a run trains: the model, or, with a `lora.rank`, a base that stands still and its adapters.

    **Arguments:**

    - `mesh`: over which the model's weights are divided as they are read.
    """
    model = config.model
    load = _loader(model.path, model.revision, mesh)
    if given.policy is not None:  # beside adapters a base stands still
        load = ft.partial(given.start_policy, copy=config.lora.rank == 0)
    return starting_policy(load, model.adapter, config.lora, model.base_dtype, config.seed)


def _loader(path: str, revision: str | None, mesh: AbstractDeviceMesh = OneDevice()) -> Load:
    return lambda dtype: load_pretrained(
        path or default_model_path(), jnp.dtype(dtype), revision=revision, place=mesh.place
    )


def model_name(config: RunConfig) -> str:
    """What to call the target in messages and in what is written."""
    return shown_name(config.model.path) or "the embedded default model"


def draft_spec(config: DraftConfig) -> str | None:
    """How a class of the user's own is found, for a saved draft; `None` where the draft itself tells."""
    return config.kind if is_import_spec(config.kind) else None


def make_draft(
    config: DraftConfig,
    target: AbstractLanguageModel,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    given: AbstractDraft | None = None,
) -> AbstractDraft:
    """The draft that a run starts with.

    **Arguments:**

    - `config`: which.
    - `target`: whom it is to draft for.
    - `seed`: for fresh weights.
    - `tokenizer`: the target's, to which that of another model is compared.
    - `given`: taken in place of the one that is named.

    **Raises:**

    `UserError` if a saved draft or a class can't be loaded, or the draft does not fit the target.
    """
    if not config.enabled:
        return NoDraft()
    key = jr.fold_in(jr.key(seed), _DRAFT_WEIGHTS)
    own, lookup = ({}, {}) if not config.options else split_options(config.kind, config.ngram, config.options)
    if given is not None:
        draft = given
    elif config.path is not None:
        draft = _saved_draft(config, target)
    else:
        draft = fresh_draft(config.kind, target, config.max_length, options=own, tokenizer=tokenizer, key=key)
    size = config.vocabulary
    is_fresh = config.path is None and given is None
    if size is None and is_fresh and has_vocabulary(draft) and target.vocab_size > 2 * _DEFAULT_VOCABULARY:
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


def make_parts(
    config: RunConfig,
    tokenizer: Tokenizer,
    draft: AbstractDraft,
    *,
    with_rewards: bool = True,
    given: Given = NOTHING_GIVEN,
    processes: AbstractProcesses | None = None,
) -> RunParts:
    """Everything but the weights. Distilling a draft needs no rewards: without them, every completion is worth 0."""
    if with_rewards:
        task, rewards = load_task_and_rewards(config, given)
    else:
        task, _ = load_split(config, given)
        rewards = Rewards(("none",), (lambda completions, **_: [0.0] * len(completions),), (1.0,))
    grpo = config.grpo
    return RunParts(
        config=config,
        mesh=run_mesh(config),
        tokenizer=tokenizer.with_chat_template_kwargs(grpo.chat_template_kwargs),
        task=task,
        rewards=rewards,
        order=ORDERS[config.curriculum],
        sampling=rollout_sampling(grpo),
        stop=make_stop(grpo.stop, tokenizer),
        verifier=make_verifier(config.draft.verifier),
        length=_length(config.draft),
        loss=loss_settings(grpo, draft.layers),
        entropy=entropy_control(grpo),
        draft_loss=make_draft_loss(config.draft.loss),
        policy_optimizer=make_policy_optimizer(grpo),
        draft_optimizer=make_optimizer(max_grad_norm=config.draft.max_grad_norm),
        processes=OneProcess() if processes is None else processes,
    )


def make_policy_optimizer(grpo: GRPOConfig) -> optax.GradientTransformation:
    """The optimizer that the configuration names."""
    return make_optimizer(
        grpo.optim,
        beta1=grpo.adam_beta1,
        beta2=grpo.adam_beta2,
        epsilon=grpo.adam_epsilon,
        weight_decay=grpo.weight_decay,
        max_grad_norm=grpo.max_grad_norm,
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
