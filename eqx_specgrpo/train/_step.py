"""The phases of a training step, each a function of what it needs: prompts, scores, the update of the policy. Rolling
out is in `_roll_out.py`, the update of the draft in `_draft_step.py`; `_loop.py` puts them together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from .._types import Prompts, Rollouts, ScoredRollouts, padding_step
from ..config import RunParts, check_prompt
from ..errors import Stopped, UserError
from ..grpo import (
    ADVANTAGE_ESTIMATORS,
    EntropyState,
    LossNormalizer,
    RowFeatures,
    apply_gradients,
    batch_of_shards,
    check_finite,
    compute_copy,
    divide_rows,
    global_norm,
    make_update_batch,
    no_gradients,
    normalize_then_sum_advantages,
    plan_micro_batches,
    policy_forward,
    policy_gradients,
    trained_part,
    with_trained_part,
)
from ..layout import ROWS
from ..models import AbstractLanguageModel, AdaptedTransformer, Tokenizer
from ..runtime import SMALL_HIDDEN_SIZE
from ..tasks import AbstractTask, Example, RewardLog, TrainerState, collate
from ._loss_inputs import loss_inputs, with_entropy_mask
from ._planner import UpdatePlanner
from ._state import PolicyUpdate
from ._step_records import check_names


def next_examples(
    task: AbstractTask,
    tokenizer: Tokenizer,
    target: AbstractLanguageModel,
    start: int,
    count: int,
    max_new: int,
    indices: Sequence[int] | None = None,
) -> tuple[list[Example], Prompts]:
    """Returns items of the task's stream from a position on, and their prompts as token ids.

    **Arguments:**

    - `indices`: which items they are, in another order than the task's own.
    """
    examples, rows = [], []
    for position in range(start, start + count):
        example, ids = _example(task, tokenizer, position, None if indices is None else indices[position - start])
        check_prompt(len(ids), position, target, max_new)
        examples.append(example)
        rows.append(ids)
    return examples, Prompts.from_lists(rows, multiple_of=padding_step(max(map(len, rows))))


def _example(task: AbstractTask, tokenizer: Tokenizer, position: int, index: int | None) -> tuple[Example, list[int]]:
    """An item and its prompt's token ids; what is wrong with them is told with the item's place."""
    try:
        example = task.at(position) if index is None else task.example(index)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # whatever made the item; how a program ends is not for it to say
        raise UserError(f"item {position} could not be made: {type(error).__name__}: {error}") from error
    try:
        return example, tokenizer.encode_prompt(example.prompt)
    except UserError as error:
        raise UserError(f"the prompt of item {position}: {error}") from error


def judge(
    parts: RunParts, examples: list[Example], rollouts: Rollouts, done: int, position: int
) -> tuple[Float[np.ndarray, "rows functions"], Float[np.ndarray, " rows"], list[str], RewardLog]:
    """Computes the rewards of each function and their weighted sum. Returns them with the texts that were judged and
    with what the reward functions logged.

    **Arguments:**

    - `done`: steps that came before.
    - `position`: items of the task that came before.
    """
    config, size = parts.config, parts.task.size
    ids = [rollouts.completion(row) for row in range(len(rollouts.group))]
    texts = [parts.tokenizer.decode(completion) for completion in ids]
    prompts, columns = collate([examples[prompt] for prompt in rollouts.group])
    log = RewardLog(len(ids))
    epoch = None if size is None else position / size
    trainer_state = TrainerState(global_step=done, max_steps=config.steps, epoch=epoch)
    per_function, total = parts.rewards(prompts, texts, ids, columns, done + 1, trainer_state, log)
    check_names(log, parts.rewards.names)
    return per_function, total, texts, log


def advantages(
    parts: RunParts,
    per_function: Float[np.ndarray, "rows functions"],
    total: Float[np.ndarray, " rows"],
    group: Int[np.ndarray, " rows"],
    num_groups: int,
) -> Float[np.ndarray, " rows"]:
    """Computes advantages from the summed rewards (`ADVANTAGE_ESTIMATORS`) or from each function's rewards
    (`normalize_then_sum_advantages`), as configured."""
    grpo = parts.config.grpo
    if grpo.multi_objective_aggregation == "normalize_then_sum":
        return normalize_then_sum_advantages(per_function, np.asarray(parts.rewards.weights), group, num_groups)
    return ADVANTAGE_ESTIMATORS[grpo.advantage_estimator](total, group, num_groups, grpo.scale_rewards)


def score(
    parts: RunParts, examples: list[Example], rollouts: Rollouts, done: int
) -> tuple[ScoredRollouts, list[str], RewardLog]:
    """Computes rewards ([`judge`][]) and [`advantages`][] of the rollouts of a step.

    **Arguments:**

    - `done`: steps that came before.
    """
    position = done * parts.config.grpo.prompts_per_step
    per_function, total, texts, log = judge(parts, examples, rollouts, done, position)
    made = advantages(parts, per_function, total, rollouts.group, len(examples))
    return ScoredRollouts(rollouts, per_function, total, made), texts, log


def update_policy(
    parts: RunParts,
    policy: AbstractLanguageModel,
    optimizer_state: Any,
    reference: AbstractLanguageModel | None,
    scored: ScoredRollouts,
    learning_rate: float,
    step: int,
    entropy: EntropyState | None = None,
    weights: AbstractLanguageModel | None = None,
    planner: UpdatePlanner | None = None,
) -> PolicyUpdate:
    """Makes all of a step's optimizer steps on one batch of rollouts. DONATES the policy (only the adapters, if it has
    some) and its optimizer's state.

    Nothing here depends on the draft, and the draft's update comes after it: given the same rollouts, the policy's
    trajectory is the same to the bit whether a draft learns, is frozen or is absent.

    **Arguments:**

    - `reference`: what the KL is measured from, in the dtype of computation; `None` without one.
    - `entropy`: of the entropy bonus's controller; `None`: as before the first step.
    - `weights`: those that the rollouts were drawn with, in the dtype of computation; `None`: they are made again,
        which gives the same bits.
    - `planner`: chooses by the memory that there is; by default as if there were enough.
    """
    grpo, mesh = parts.config.grpo, parts.mesh
    batch = make_update_batch(
        scored.rollouts, scored.advantages, mask_truncated_completions=grpo.mask_truncated_completions
    )
    width, new = batch.tokens.shape[1], batch.completion_tokens.shape[1]
    # The update of a small model takes less time than compiling it for another shape, or its forward alone.
    is_small = policy.hidden_size <= SMALL_HIDDEN_SIZE
    model = policy.base if isinstance(policy, AdaptedTransformer) else policy
    choice = (UpdatePlanner() if planner is None else planner).choose(parts, model, batch)
    plan = plan_micro_batches(
        scored.rollouts.lengths,
        new,
        num_parts=grpo.gradient_accumulation_steps,
        max_tokens=choice.max_tokens,
        sort=not parts.loss.loss.traits.depends_on_micro_batches,
        prompt_of_row=scored.rollouts.group,
        prompt_width=width - new,
        rows_with_gradient=None
        if is_small
        else batch.rows_with_gradient(with_kl=reference is not None or parts.loss.entropy_bonus),
        one_shape=is_small,
        shards=mesh.data,
    )
    divided = [divide_rows(micro.rows, mesh.data) for micro in plan]
    batch, given = loss_inputs(parts, policy, reference, batch, plan, scored)
    entropy = parts.entropy.init() if entropy is None else entropy
    metrics: dict[str, float] = {}
    features = []
    for iteration in range(grpo.num_iterations):
        if weights is None or iteration > 0:
            weights = compute_copy(policy, parts.config.model.dtype, mesh)
        adapters = policy.adapters if isinstance(policy, AdaptedTransformer) else None
        if grpo.top_entropy_quantile < 1:
            batch = with_entropy_mask(parts, weights, batch, plan)
        normalizer = LossNormalizer.from_mask(
            batch.completion_mask,
            grpo.max_completion_length,
            num_micro_batches=len(plan),
            entropy_mask=batch.entropy_mask,
        )
        settings = dataclasses.replace(
            parts.loss,
            entropy_coef=parts.entropy.coefficient(entropy),
            gradient_checkpointing=choice.gradient_checkpointing,
        )
        total, features = None, []
        for micro, of_shards in zip(plan, divided, strict=True):
            rows = mesh.put(batch_of_shards(batch, of_shards, micro.width), ROWS)
            if micro.has_gradient:
                part, part_features = policy_gradients(
                    weights, rows, normalizer, settings, adapters=adapters, mesh=mesh
                )
            else:
                part, part_features = policy_forward(weights, rows, normalizer, settings, mesh=mesh)
            total = part if total is None else total + part
            features.append(part_features)
        assert total is not None
        # With nothing to learn from the optimizer goes on all the same: it has momentum, and weights may decay.
        gradients = no_gradients(trained_part(policy), mesh) if total.gradients is None else total.gradients
        norm = global_norm(gradients)
        check_finite("policy", step, loss=total.loss, grad_norm=norm)
        rate = jnp.float32(learning_rate)
        trained, optimizer_state = apply_gradients(
            (parts.policy_optimizer, gradients, rate), trained_part(policy), optimizer_state, mesh
        )
        policy = with_trained_part(policy, trained)
        means = {name: float(value) for name, value in total.metrics.means().items()}
        if iteration == 0:
            # Before any inner step both sides have the same weights: the gap is rounding, or decoding is not lossless.
            metrics["sampling/sampling_logp_difference/mean"] = means["log_ratio/abs_mean"]
            metrics["sampling/sampling_logp_difference/max"] = means["log_ratio/abs_max"]
        metrics |= {name: value for name, value in means.items() if not name.startswith("log_ratio/")}
        metrics["loss"] = float(total.loss)
        metrics["grad_norm"] = float(norm)
        metrics["entropy"] = float(total.entropy_sum / jnp.maximum(total.metrics.num_tokens, 1))
        if total.metrics.entropy_bonus is not None:
            metrics["policy_loss"] = float(total.loss + settings.entropy_coef * total.metrics.entropy_bonus)
            entropy = parts.entropy.update(entropy, total.metrics.entropy_bonus)
            metrics["entropy_coef"] = float(entropy.coef)
    metrics |= given
    metrics["learning_rate"] = learning_rate
    assert weights is not None
    features = RowFeatures.of_parts(features, divided, width, mesh)
    return PolicyUpdate(policy, optimizer_state, weights, features, batch, metrics, entropy)


def step_key(seed: int, step: int, purpose: int) -> Key[Array, ""]:
    """Returns the random key of a step. It is a function of the seed and the step alone, so that resuming needs no
    random state.

    **Arguments:**

    - `step`: how many steps came before; -1 and below for the warm-up.
    - `purpose`: see the constants of `_lessons.py`.
    """
    return jr.fold_in(jr.fold_in(jr.key(seed), step & 0xFFFFFFFF), purpose)
