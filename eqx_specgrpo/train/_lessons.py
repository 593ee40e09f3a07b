"""Teaching a draft outside of policy updates: what a run's warm-up and `specgrpo distill` have in common.

The policy stands still, so the features of a batch of rollouts are computed once and serve several updates.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from .._types import Rollouts, Support
from ..config import DraftConfig, RunParts
from ..decoding import DecodeProgress
from ..distill import draft_gradients
from ..drafts import AbstractDraft, remember
from ..grpo import (
    RowFeatures,
    UpdateBatch,
    chunked_logprobs,
    compute_copy,
    make_update_batch,
    next_token_positions,
)
from ..layout import ROWS, WHOLE, AbstractDeviceMesh, Layout, at_use
from ..models import AbstractLanguageModel
from ._draft_step import POSITION_DECAY, draft_batch, draft_rows, features_of, update_draft
from ._roll_out import roll_out_together
from ._state import RunState
from ._step import next_examples, step_key

# What a step's random numbers are for.
DECODE, CHOOSE, COMPARE = 0, 1, 2
# Rows are drawn anew for each update, so that a batch is gone through about so many times before it is replaced.
_PASSES = 4
_WARMUP_UPDATES = 10


class Lesson(eqx.Module):
    """A batch of rollouts for the draft to learn from, with the target's features of them.

    **Arguments:**

    - `rollouts`: of the policy.
    - `batch`: the same as whole sequences.
    - `features`: of the sequences.
    """

    rollouts: Rollouts
    batch: UpdateBatch
    features: RowFeatures


def updates_per_lesson(parts: RunParts) -> int:
    """How many updates a batch of rollouts serves."""
    return max(1, round(_PASSES / parts.config.draft.fraction))


def updates_per_warm_up_lesson(draft: DraftConfig) -> int:
    """How many updates a batch of rollouts serves in a run's warm-up: about as many as elsewhere, so that a second one,
    which can take as long as a step's rollouts, is not made for the last few."""
    return -(-draft.warmup // max(1, round(draft.warmup * draft.fraction / _PASSES)))


def make_lesson(
    parts: RunParts,
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    layers: tuple[int, ...],
    number: int,
    on_progress: Callable[[DecodeProgress], None] | None = None,
) -> Lesson:
    """Makes rollouts of the prompts that step `number` of a run will have (counted from 0), with their own random
    numbers.

    **Arguments:**

    - `draft`: the draft to decode with. It does not change the distribution of the rollouts.
    - `layers`: the target's layers whose features are kept.
    - `number`: of the lesson.
    """
    grpo = parts.config.grpo
    _, prompts = next_examples(
        parts.task,
        parts.tokenizer,
        target,
        number * grpo.prompts_per_step,
        grpo.prompts_per_step,
        grpo.max_completion_length,
    )
    key = step_key(parts.config.seed, -1 - number, DECODE)
    phase = f"rollouts of lesson {number + 1}"
    copies = parts.mesh.copies((target, draft))
    rollouts = roll_out_together(parts, *copies, prompts, key, phase, on_progress)
    del copies
    batch = make_update_batch(rollouts, np.zeros(len(rollouts.group), np.float32))
    return Lesson(rollouts, batch, features_of(target, batch, layers, parts.mesh))


def recall_lesson(state: RunState, lesson: Lesson) -> RunState:
    """Returns the state after the draft has remembered the lesson's rollouts, if it has a memory."""
    return dataclasses.replace(state, draft=remember(state.draft, lesson.rollouts))


def with_scheduled_rate(parts: RunParts, update: int, done: float) -> RunParts:
    """The draft's learning rate at an update: rising over the first ten, then constant until half of the time is over,
    then falling linearly to 0.

    Without the rise, Adam's first steps would throw a layer with attention far off (docs/experiments.md).

    **Arguments:**

    - `update`: counted from 0.
    - `done`: the share of the time that is over.
    """
    draft = parts.config.draft
    factor = min(1.0, (update + 1) / _WARMUP_UPDATES, 2 * (1 - done))
    draft = draft.model_copy(update={"learning_rate": draft.learning_rate * factor})
    return dataclasses.replace(parts, config=parts.config.model_copy(update={"draft": draft}))


def learn_lesson(
    parts: RunParts, state: RunState, target: AbstractLanguageModel, lesson: Lesson, update: int
) -> tuple[RunState, dict[str, float]]:
    """Makes one update of the draft on `draft.fraction` of the lesson's rows, chosen at random.

    DONATES the draft and its optimizer's state.

    **Arguments:**

    - `target`: the model with the weights that the features were computed with.
    - `update`: counted from 0, over all lessons.
    """
    key = step_key(parts.config.seed, -1 - update, CHOOSE)
    rows = draft_rows(key, len(lesson.rollouts.group), parts.config.draft.fraction)
    return update_draft(parts, state, target, lesson.features, lesson.batch, lesson.rollouts.lengths, rows, step=0)


def examine(
    parts: RunParts,
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    lesson: Lesson,
    alpha: Float[Array, " draft"],
) -> tuple[float, list[float]]:
    """Computes loss and expected acceptance by position on a whole lesson, without learning from it.

    It takes as many rows at a time as an update has, so that the same program is used.
    """
    draft = compute_copy(draft, parts.config.model.dtype, lesson.features.mesh)
    rows = len(lesson.rollouts.group)
    chosen = len(draft_rows(jr.key(0), rows, parts.config.draft.fraction))
    total, accepted, counts = 0.0, np.zeros(draft.train_length), np.zeros(draft.train_length)
    starts = range(0, rows - chosen + 1, chosen)
    for start in starts:
        part = np.arange(start, start + chosen)
        lengths = lesson.rollouts.lengths[part]
        result = draft_gradients(
            draft,
            target,
            draft_batch(lesson.features, lesson.batch, lesson.rollouts.lengths, part),
            parts.draft_loss,
            temperature=parts.loss.temperature,
            alpha=alpha,
            position_decay=jnp.float32(POSITION_DECAY),
            new=lesson.batch.completion_tokens.shape[1],
            truncation=parts.truncation,
            mesh=lesson.features.mesh,
        )
        # The first token of a completion is the prompt pass's; offset k of the draft is k + 1 tokens later.
        count = np.maximum(lengths[:, None] - 1 - np.arange(draft.train_length)[None], 0).sum(0)
        total += float(result.loss) / len(starts)
        accepted += np.asarray(result.acceptance) * count
        counts += count
    return total, (accepted / np.maximum(counts, 1)).tolist()


def mean_entropy(parts: RunParts, target: AbstractLanguageModel, lesson: Lesson) -> float:
    """Computes the mean entropy of the sampling distribution over the lesson's completion tokens, in nats per token."""
    batch, features = lesson.batch, lesson.features
    rows, of_rows = features.rows, (batch.completion_tokens, batch.prompt_lengths, batch.support)
    tokens, prompt_lengths, support = features.mesh.put(jax.tree.map(lambda x: np.asarray(x)[rows], of_rows), ROWS)
    entropies = _entropies(
        target,
        features.features.last,
        tokens,
        prompt_lengths,
        support,
        parts.loss.temperature,
        parts.loss.chunk,
        features.mesh,
    )
    of_rows = features.mesh.fetch(entropies)[features.slots]
    return float((of_rows * batch.completion_mask).sum() / batch.completion_mask.sum())


@eqx.filter_jit
def _entropies(
    target: AbstractLanguageModel,
    hidden: Float[Array, "rows seq hidden"],
    tokens: Int[Array | np.ndarray, "rows new"],
    prompt_lengths: Int[Array | np.ndarray, " rows"],
    support: Support | None,
    temperature: Float[Array, ""],
    chunk: int,
    mesh: AbstractDeviceMesh,
) -> Float[Array, "rows new"]:
    specs = mesh.data_specs(target, Layout.MASTER)

    def of_shard(target, hidden, tokens, prompt_lengths, temperature, support):
        rows, new = tokens.shape
        index = next_token_positions(jnp.asarray(prompt_lengths), new)
        hidden = jnp.take_along_axis(hidden, index[:, :, None], axis=1).reshape(rows * new, -1)
        support = jax.tree.map(lambda x: x.reshape(rows * new, *x.shape[2:]), support)
        unembed = at_use(mesh, target, specs).unembed
        _, entropies = chunked_logprobs(hidden, tokens.reshape(-1), unembed, temperature, chunk, support=support)
        return jax.lax.stop_gradient(entropies).reshape(rows, new)

    return mesh.by_shard(of_shard, (specs, ROWS, ROWS, ROWS, WHOLE, ROWS), ROWS)(
        target, hidden, tokens, prompt_lengths, temperature, support
    )
