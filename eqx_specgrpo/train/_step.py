"""The four phases of a training step, each a function of what it needs: roll out, score, update the policy, update
the draft. `_loop.py` puts them together."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, Key

from .._types import Prompts, Rollouts, ScoredRollouts, StopReason
from ..config import RunParts, check_prompt
from ..decoding import DecodeProgress, decode
from ..distill import DraftBatch, draft_gradients, fit_temperature, select_rows
from ..drafts import AbstractDraft, completion_tokens, coverage, draft_vocabulary, tempered_part, with_temperature
from ..errors import Stopped, UserError
from ..grpo import (
    LossNormalizer,
    UpdateBatch,
    apply_gradients,
    check_finite,
    compute_copy,
    frac_reward_zero_std,
    global_norm,
    group_advantages,
    make_update_batch,
    no_gradients,
    plan_micro_batches,
    policy_forward,
    policy_gradients,
    policy_logprobs,
    training_features,
)
from ..models import AbstractLanguageModel, Features, Tokenizer
from ..runtime import SMALL_HIDDEN_SIZE
from ..tasks import AbstractTask, Example, Rewards, collate
from ._planner import UpdatePlanner
from ._segments import SegmentLog
from ._state import RunState

_PROMPT_WIDTH = 32  # prompts are padded to a multiple of this, so that few widths are compiled
POSITION_DECAY = 0.8  # weight of a draft position relative to the one before it (Cai et al. 2024, section 2.2.1)


def next_examples(
    task: AbstractTask, tokenizer: Tokenizer, target: AbstractLanguageModel, start: int, count: int, max_new: int
) -> tuple[list[Example], Prompts]:
    """Items of the task's stream from a position on, and their prompts as token ids."""
    examples, rows = [], []
    for position in range(start, start + count):
        example, ids = _example(task, tokenizer, position)
        check_prompt(len(ids), position, target, max_new)
        examples.append(example)
        rows.append(ids)
    return examples, Prompts.from_lists(rows, multiple_of=_PROMPT_WIDTH)


def _example(task: AbstractTask, tokenizer: Tokenizer, position: int) -> tuple[Example, list[int]]:
    """An item and its prompt's token ids; what is wrong with them is told with the item's place."""
    try:
        example = task.at(position)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # whatever made the item; how a program ends is not for it to say
        raise UserError(f"item {position} could not be made: {type(error).__name__}: {error}") from error
    try:
        return example, tokenizer.encode_prompt(example.prompt)
    except UserError as error:
        raise UserError(f"the prompt of item {position}: {error}") from error


def roll_out(
    parts: RunParts,
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    prompts: Prompts,
    key: Key[Array, ""],
    on_progress: Callable[[DecodeProgress], None] | None = None,
    segments: SegmentLog | None = None,
) -> Rollouts:
    """Completions of the prompts, `num_generations` each.

    **Arguments:**

    - `segments`: goes on with what the length controller has learned, and collects what it sees.
    """
    grpo = parts.config.grpo
    segments = SegmentLog() if segments is None else segments
    return decode(
        target,
        prompts,
        draft=draft,
        verifier=parts.verifier,
        length=parts.length,
        length_state=segments.length_state,
        sampling=parts.sampling,
        key=key,
        max_new_tokens=grpo.max_completion_length,
        eos_ids=parts.tokenizer.eos_ids,
        samples=grpo.num_generations,
        max_rows=grpo.max_rows,
        on_progress=on_progress,
        on_segment=segments,
    )


def score(
    rewards: Rewards, tokenizer: Tokenizer, examples: list[Example], rollouts: Rollouts, scale_rewards: str, step: int
) -> tuple[ScoredRollouts, list[str]]:
    """Rewards, advantages and the texts that were judged."""
    ids = [rollouts.completion(row) for row in range(len(rollouts.group))]
    texts = [tokenizer.decode(completion) for completion in ids]
    prompts, columns = collate([examples[prompt] for prompt in rollouts.group])
    per_function, total = rewards(prompts, texts, ids, columns, step)
    advantages = group_advantages(total, rollouts.group, len(examples), scale_rewards)  # pyright: ignore[reportArgumentType]
    return ScoredRollouts(rollouts, per_function, total, advantages), texts


def update_policy(
    parts: RunParts,
    policy: AbstractLanguageModel,
    optimizer_state: Any,
    reference: AbstractLanguageModel | None,
    scored: ScoredRollouts,
    learning_rate: float,
    step: int,
    planner: UpdatePlanner | None = None,
) -> tuple[AbstractLanguageModel, Any, AbstractLanguageModel, Features, UpdateBatch, dict[str, float]]:
    """All of a step's optimizer steps on one batch of rollouts. DONATES the policy and its optimizer's state.

    Nothing here depends on the draft, and the draft's update comes after it: given the same rollouts, the policy's
    trajectory is the same to the bit whether a draft learns, is frozen or is absent.

    **Arguments:**

    - `planner`: chooses by the memory that there is; by default as if there were enough.

    **Returns:**

    Policy and optimizer state; the weights and features of the last forward, for the draft to learn from; the batch;
    metrics.
    """
    grpo = parts.config.grpo
    batch = make_update_batch(
        scored.rollouts, scored.advantages, mask_truncated_completions=grpo.mask_truncated_completions
    )
    width, new = batch.tokens.shape[1], batch.completion_tokens.shape[1]
    choice = (UpdatePlanner() if planner is None else planner).choose(parts, policy, batch)
    loss = dataclasses.replace(parts.loss, gradient_checkpointing=choice.gradient_checkpointing)
    plan = plan_micro_batches(
        scored.rollouts.lengths,
        new,
        num_parts=grpo.gradient_accumulation_steps,
        max_tokens=choice.max_tokens,
        sort=parts.loss.loss_type != "bnpo",  # whose value depends on which rows are together
        prompt_of_row=scored.rollouts.group,
        prompt_width=width - new,
        # A small model's backward takes less time than compiling its forward alone.
        rows_with_gradient=None
        if policy.hidden_size <= SMALL_HIDDEN_SIZE
        else batch.rows_with_gradient(with_kl=reference is not None),
    )
    if reference is not None:
        gaps = np.zeros(batch.old_logprobs.shape, np.float32)
        for micro in plan:
            part = policy_logprobs(reference, batch.rows(micro.rows, micro.width), loss)
            gaps[micro.rows, : part.shape[1]] = part
        batch = eqx.tree_at(lambda b: b.reference_logprobs, batch, gaps, is_leaf=lambda leaf: leaf is None)
    normalizer = LossNormalizer.from_mask(
        batch.completion_mask, grpo.max_completion_length, num_micro_batches=len(plan)
    )
    metrics: dict[str, float] = {}
    weights, features = policy, []
    for iteration in range(grpo.num_iterations):
        weights = compute_copy(policy, parts.config.model.dtype)
        total, features = None, []
        for micro in plan:
            evaluate = policy_gradients if micro.has_gradient else policy_forward
            part, part_features = evaluate(
                weights, batch.rows(micro.rows, micro.width), normalizer, loss, feature_width=width
            )
            total = part if total is None else total + part
            features.append(part_features)
        assert total is not None
        # With nothing to learn from the optimizer goes on all the same: it has momentum, and weights may decay.
        gradients = no_gradients(policy) if total.gradients is None else total.gradients
        norm = global_norm(gradients)
        check_finite("policy", step, loss=total.loss, grad_norm=norm)
        rate = jnp.float32(learning_rate)
        policy, optimizer_state = apply_gradients((parts.policy_optimizer, gradients, rate), policy, optimizer_state)
        means = {name: float(value) for name, value in total.metrics.means().items()}
        if iteration == 0:
            # Before any inner step both sides have the same weights: the gap is rounding, or decoding is not lossless.
            metrics["sampling/sampling_logp_difference/mean"] = means["log_ratio/abs_mean"]
            metrics["sampling/sampling_logp_difference/max"] = means["log_ratio/abs_max"]
        metrics |= {name: value for name, value in means.items() if not name.startswith("log_ratio/")}
        metrics["loss"] = float(total.loss)
        metrics["grad_norm"] = float(norm)
        metrics["entropy"] = float(total.entropy_sum / jnp.maximum(total.metrics.num_tokens, 1))
    metrics["learning_rate"] = learning_rate
    back = np.argsort(np.concatenate([micro.rows for micro in plan]))
    return policy, optimizer_state, weights, _in_order(features, back), batch, metrics


@eqx.filter_jit
def _in_order(parts: list[Features], order: Int[np.ndarray | Array, " rows"]) -> Features:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs)[order], *parts)


def update_draft(
    parts: RunParts,
    state: RunState,
    target: AbstractLanguageModel,
    features: Features,
    batch: UpdateBatch,
    lengths: Int[np.ndarray, " rows"],
    rows: Int[np.ndarray, " chosen"],
    step: int,
) -> tuple[RunState, dict[str, float]]:
    """One optimizer step of the draft on some of the rollouts. DONATES the draft and its optimizer's state.

    **Arguments:**

    - `target`: the weights that gave the features.
    - `features`, `batch`: of all the rollouts, as `update_policy` gave them.
    - `lengths`: of the completions; truncated ones teach the draft as well, and so do groups without an advantage.
    - `rows`: the rollouts to learn from.
    """
    config = parts.config.draft
    chosen = select_rows(
        features,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.prompt_lengths),
        jnp.asarray(lengths),
        jnp.asarray(rows),
    )
    result = draft_gradients(
        compute_copy(state.draft, parts.config.model.dtype),
        target,
        chosen,
        parts.draft_loss,
        temperature=parts.loss.temperature,
        alpha=state.draft_acceptance,
        position_decay=jnp.float32(POSITION_DECAY),
        new=batch.completion_tokens.shape[1],
    )
    norm = global_norm(result.gradients)
    check_finite("draft", step, loss=result.loss, grad_norm=norm)
    draft, optimizer_state = apply_gradients(
        (parts.draft_optimizer, result.gradients, jnp.float32(config.learning_rate)), state.draft, state.draft_optimizer
    )
    state = RunState(state.policy, state.policy_optimizer, draft, optimizer_state, result.acceptance)
    metrics = {"draft/loss": float(result.loss), "draft/grad_norm": float(norm)}
    for position, acceptance in enumerate(np.asarray(result.acceptance).tolist()):
        metrics[f"draft/expected_acceptance_pos_{position}"] = acceptance
    if config.fit_temperature:
        fitted, fit_metrics = _fit_temperature(parts, state.draft, target, chosen, batch.completion_tokens.shape[1])
        state = dataclasses.replace(state, draft=fitted)
        metrics |= fit_metrics
    return state, metrics


def _fit_temperature(
    parts: RunParts, draft: AbstractDraft, target: AbstractLanguageModel, chosen: DraftBatch, new: int
) -> tuple[AbstractDraft, dict[str, float]]:
    """The draft with temperatures that follow what is accepted most on these rollouts."""
    copy = compute_copy(draft, parts.config.model.dtype)
    fitted, fit = fit_temperature(copy, target, chosen, temperature=parts.loss.temperature, new=new)
    part = tempered_part(fitted)
    assert part is not None
    metrics = {}
    for position, acceptance in enumerate(np.asarray(fit.after).tolist()):
        metrics[f"draft/tempered_acceptance_pos_{position}"] = acceptance
        metrics[f"draft/temperature_pos_{position}"] = float(part.temperature[position])
    return with_temperature(draft, part.steps), metrics


def vocabulary_metrics(draft: AbstractDraft, rollouts: Rollouts) -> dict[str, float]:
    """How much of the policy's completions a draft of a reduced vocabulary could have said; nothing for others."""
    vocabulary = draft_vocabulary(draft)
    if vocabulary.size == 0:
        return {}
    return {"draft/coverage": coverage(vocabulary, completion_tokens(rollouts))}


def features_of(target: AbstractLanguageModel, batch: UpdateBatch, layers: tuple[int, ...]) -> Features:
    """The target's features of whole sequences, for a draft that learns outside a policy update."""
    return _features(target, batch, layers)


@eqx.filter_jit
def _features(target: AbstractLanguageModel, batch: UpdateBatch, layers: tuple[int, ...]) -> Features:
    return training_features(target, batch, layers=layers)[1]


def rollout_metrics(scored: ScoredRollouts, reward_names: tuple[str, ...]) -> dict[str, float]:
    """What the rollouts themselves say: rewards, lengths, acceptance. TRL's names where it has them."""
    rollouts, rewards = scored.rollouts, scored.rewards
    lengths, ended = rollouts.lengths, rollouts.stop_reasons == StopReason.EOS
    groups = len(rollouts.prompts.lengths)
    valid = ~np.isnan(rewards)
    per_group = [rewards[(rollouts.group == g) & valid] for g in range(groups)]
    metrics = {
        "reward": float(rewards[valid].mean()) if valid.any() else math.nan,
        "reward_std": float(np.mean([r.std(ddof=1) if len(r) > 1 else 0.0 for r in per_group])),
        "frac_reward_zero_std": frac_reward_zero_std(rewards, rollouts.group, groups),
    }
    for name, column in zip(reward_names, scored.rewards_per_function.T, strict=True):
        applied = column[~np.isnan(column)]
        metrics[f"rewards/{name}/mean"] = float(applied.mean()) if len(applied) else math.nan
        metrics[f"rewards/{name}/std"] = float(applied.std(ddof=1)) if len(applied) > 1 else 0.0
    metrics |= {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(lengths[ended].mean()) if ended.any() else 0.0,
        "completions/clipped_ratio": float((~ended).mean()),
    }
    statistics = rollouts.statistics
    metrics |= {
        "spec/acceptance_length": statistics.acceptance_length,
        "spec/acceptance_rate": statistics.acceptance_rate,
        "spec/draft_length": float(statistics.drafted.sum() / max(statistics.target_forwards.sum(), 1)),
        "spec/target_forwards": float(statistics.target_forwards.sum()),
    }
    for position, rate in enumerate(statistics.acceptance_rate_by_position):
        if statistics.drafted[:, position].any():
            metrics[f"spec/acceptance_rate_pos_{position}"] = rate
    return metrics


def completion_records(
    step: int, examples: list[Example], scored: ScoredRollouts, texts: list[str], reward_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One JSON-able object a completion, for `completions.jsonl`."""
    rollouts = scored.rollouts
    return [
        {
            "step": step,
            "prompt": examples[prompt].prompt,
            "completion": texts[row],
            "length": int(rollouts.lengths[row]),
            "stop_reason": StopReason(int(rollouts.stop_reasons[row])).name.lower(),
            **{name: float(scored.rewards_per_function[row, i]) for i, name in enumerate(reward_names)},
            "reward": float(scored.rewards[row]),
            "advantage": float(scored.advantages[row]),
        }
        for row, prompt in enumerate(rollouts.group)
    ]


def step_key(seed: int, step: int, purpose: int) -> Key[Array, ""]:
    """Random keys are functions of the seed and the step alone, so that resuming needs no random state.

    **Arguments:**

    - `step`: counted from 0; -1 and below for the warm-up.
    - `purpose`: see the constants of `_loop.py`.
    """
    return jr.fold_in(jr.fold_in(jr.key(seed), step & 0xFFFFFFFF), purpose)


def draft_rows(key: Key[Array, ""], rows: int, fraction: float) -> Int[np.ndarray, " chosen"]:
    """Which rollouts the draft learns from: a random share, at least one, the same number in every step."""
    chosen = max(1, min(rows, round(fraction * rows)))
    return np.sort(np.asarray(jr.permutation(key, rows))[:chosen])
