"""From a configuration to the objects of a run. The only place that turns names into classes."""

from importlib import resources
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from ..decoding import (
    AbstractLengthController,
    AbstractVerifier,
    AdaptiveLength,
    Block,
    Coupled,
    FixedLength,
    GreedyMatch,
    Rejection,
)
from ..distill import AbstractDraftLoss, EndToEndTV, ForwardKL, LKHybrid, ReverseKL, TotalVariation
from ..drafts import (
    AbstractDraft,
    DraftError,
    EagleDraft,
    FallbackDraft,
    FullVocabulary,
    HydraHeads,
    LayerSkipDraft,
    MedusaHeads,
    NGramDraft,
    NoDraft,
    ReducedVocabulary,
    TemperedDraft,
    check_fit,
    check_same_vocabulary,
    custom_draft,
    draft_vocabulary,
    has_vocabulary,
    load_draft,
    load_model_draft,
    most_used_tokens,
    tempered_part,
    with_vocabulary,
)
from ..errors import UserError, did_you_mean
from ..grpo import LossSettings, adamw
from ..models import AbstractLanguageModel, Tokenizer, Transformer, load_pretrained
from ..sampling import AbstractSampling, Sampling
from ..tasks import AbstractTask, Rewards, load_task
from ._check import check_saved_draft, load_task_and_rewards
from ._load import draft_config
from ._tree import DRAFT_KINDS, DraftConfig, RunConfig

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
    draft = _saved_draft(config, target) if config.path is not None else _fresh_draft(config, target, tokenizer, key)
    size = config.vocabulary
    if size is None and config.path is None and has_vocabulary(draft) and target.vocab_size > 2 * _DEFAULT_VOCABULARY:
        size = _DEFAULT_VOCABULARY
    if size is not None and size != draft_vocabulary(draft).size:
        draft = _of_other_vocabulary(draft, size, target, tokenizer)
    if config.fit_temperature and draft.train_length > 0 and tempered_part(draft) is None:
        is_fallback = isinstance(draft, FallbackDraft)
        draft = FallbackDraft(draft.first, TemperedDraft(draft.then)) if is_fallback else TemperedDraft(draft)
    if config.ngram and not isinstance(draft, FallbackDraft):
        draft = FallbackDraft(_lookup(config, shortest=3), draft)
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
    draft = load_draft(Path(config.path).expanduser(), target)
    return draft.then if isinstance(draft, FallbackDraft) and not config.ngram else draft


def _fresh_draft(
    config: DraftConfig, target: AbstractLanguageModel, tokenizer: Tokenizer | None, key: PRNGKeyArray
) -> AbstractDraft:
    match config.kind:
        case "medusa":
            return MedusaHeads.fresh(target.hidden_size, config.max_length)
        case "hydra":
            return HydraHeads(target.hidden_size, config.max_length, key=key)
        case "eagle":
            return EagleDraft.for_target(
                _transformer(target, config.kind),
                max_length=config.max_length,
                train_length=config.train_length,
                key=key,
            )
        case "model":
            assert config.model is not None  # the configuration has seen to it
            draft, its_tokenizer = load_model_draft(config.model, config.max_length)
            if tokenizer is not None:
                check_same_vocabulary(its_tokenizer, tokenizer)
            return draft
        case "layer_skip":
            depth = _transformer(target, config.kind).config.num_layers
            num_layers = max(1, depth // 4) if config.num_layers is None else config.num_layers
            return LayerSkipDraft(target.hidden_size, num_layers, config.max_length, key=key)
        case "ngram":
            return _lookup(config, shortest=2)
        case "none":
            return NoDraft()
        case _:
            return custom_draft(config.kind, target, config.max_length, key=key)


def _lookup(config: DraftConfig, shortest: int) -> NGramDraft:
    shortest = config.min_ngram or shortest
    return NGramDraft(config.max_length, min_ngram=shortest, max_ngram=max(4, shortest))


def _transformer(target: AbstractLanguageModel, kind: str) -> Transformer:
    if not isinstance(target, Transformer):
        raise DraftError(
            f"a draft of kind {kind!r} is made of the layers of a Transformer, but the target is a "
            f"{type(target).__name__}: use another kind"
        )
    return target


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
        task = load_task(config.task.name, config.seed, config.task.options)
        rewards = Rewards(("none",), (lambda completions, **_: [0.0] * len(completions),), (1.0,))
    grpo = config.grpo
    return RunParts(
        config=config,
        tokenizer=tokenizer,
        task=task,
        rewards=rewards,
        sampling=Sampling(jnp.float32(grpo.temperature)),
        verifier=make_verifier(config.draft.verifier),
        length=_length(config.draft),
        loss=LossSettings(
            temperature=grpo.temperature,
            epsilon=grpo.epsilon,
            epsilon_high=grpo.epsilon_high,
            delta=grpo.delta,
            beta=grpo.beta,
            loss_type=grpo.loss_type,
            chunk=grpo.logprob_chunk,
            layers=draft.layers,
            gradient_checkpointing=grpo.gradient_checkpointing is True,  # "auto" is decided for each update
        ),
        draft_loss=_draft_loss(config.draft.loss),
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


def make_verifier(name: str) -> AbstractVerifier:
    """The verifier of a name; `greedy` keeps only the likeliest tokens, and is lossless at temperature 0 alone."""
    match name:
        case "rejection":
            return Rejection()
        case "block":
            return Block()
        case "coupled":
            return Coupled()
        case "greedy":
            return GreedyMatch()
        case _:
            names = ("rejection", "block", "coupled", "greedy")
            raise UserError(f"there is no verifier {name!r}.{did_you_mean(name, names)}")


def _draft_loss(name: Literal["kl", "reverse_kl", "tv", "hybrid", "e2e_tv"]) -> AbstractDraftLoss:
    match name:
        case "kl":
            return ForwardKL()
        case "reverse_kl":
            return ReverseKL()
        case "tv":
            return TotalVariation()
        case "hybrid":
            return LKHybrid(eta=10.0)
        case "e2e_tv":
            return EndToEndTV()


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
