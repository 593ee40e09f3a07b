"""What a step learns from: prompts, rollouts and rewards, and, with dynamic sampling, more of them until the step is
full."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import Bool, Float, Int

from .._types import Rollouts, ScoredRollouts
from ..config import RunParts
from ..decoding import DecodeProgress
from ..drafts import AbstractDraft
from ..evaluation import Judgement, gather_rewards, gather_rollouts, own_prompts
from ..grpo import frac_reward_zero_std, make_update_batch
from ..models import AbstractLanguageModel
from ..records import RunProgress
from ..tasks import Example, indices_from
from ._diverged import naming_the_step
from ._draft_step import draft_rows, features_of, update_draft
from ._groups import join_groups, rows_of_groups
from ._lessons import CHOOSE, DECODE
from ._prompt_lengths import PromptLengths
from ._roll_out import roll_out, waiting
from ._segments import SegmentLog
from ._state import RunState
from ._step import advantages, judge, next_examples, step_key


class SampleBatch(NamedTuple):
    """A batch of prompts that were answered and judged.

    **Arguments:**

    - `indices`, `examples`: the items.
    - `rollouts`: their completions.
    - `rewards`: of the completions, and what reward functions wrote down.
    - `advantages`: of the batch for itself.
    - `texts`: what was judged.
    - `seconds`: of decoding and judging.
    """

    indices: list[int]
    examples: list[Example]
    rollouts: Rollouts
    rewards: Judgement
    advantages: Float[np.ndarray, " rows"]
    texts: list[str]
    seconds: float

    @property
    def teaches(self) -> Bool[np.ndarray, " groups"]:
        """Which groups move the policy: those with an advantage other than 0."""
        group = self.rollouts.group
        return np.array([bool((self.advantages[group == one] != 0).any()) for one in range(len(self.examples))])


class StepSample(NamedTuple):
    """What a step learns from.

    **Arguments:**

    - `examples`, `scored`, `texts`: the step's groups.
    - `extra`: columns that reward functions logged, one value a row.
    - `metrics`: what reward functions logged, and what sampling took.
    - `decoded`: all rollouts, batch by batch, and which of their groups the step does without.
    - `position`, `order`: of the state after the step.
    """

    examples: list[Example]
    scored: ScoredRollouts
    texts: list[str]
    extra: Mapping[str, Sequence[Any]]
    metrics: dict[str, float]
    decoded: list[tuple[Rollouts, list[int]]]
    position: int
    order: Any

    @property
    def num_tokens(self) -> int:
        """Completion tokens that were decoded in all."""
        return sum(int(rollouts.lengths.sum()) for rollouts, _ in self.decoded)


def sample_step(
    parts: RunParts,
    state: RunState,
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    done: int,
    progress: RunProgress,
    segments: SegmentLog,
    lengths: PromptLengths,
    decoding: Callable[[DecodeProgress], None],
) -> StepSample:
    """Answers prompts until the step has as many groups that teach as it has prompts, or has taken as many batches as
    it may (`grpo.max_sample_batches`).

    A group whose advantages are all 0, because all its rewards are equal, moves nothing: other prompts take its place.
    Where the limit is reached the step is filled up with such groups, the first of them first, so that it has as many
    rows as any other. Of what is decoded too much, the prompts come again in the next step: the place in the data goes
    on behind the last group that was used.

    ??? cite

        DAPO's dynamic sampling, [arXiv:2503.14476](https://arxiv.org/abs/2503.14476), section 3.2, equation 11. By the
        spread of the rewards and not by the share of right answers, so that it holds for any reward.

    **Arguments:**

    - `target`, `draft`: in the dtype of computation.
    - `done`: steps that came before.
    - `segments`: goes on with what the length controller has learned.
    - `lengths`: of earlier completions.
    - `decoding`: called between the decoder's segments.
    """
    grpo, step, processes = parts.config.grpo, done + 1, parts.processes
    count, most = grpo.prompts_per_step, max(1, grpo.max_sample_batches)
    key = step_key(parts.config.seed, done, DECODE)

    def answered(number: int) -> SampleBatch:
        begin, start = time.perf_counter(), state.position + number * count
        which = f", batch {number + 1} of prompts" if number else ""
        with progress.timed("rollout", f"step {step}: rollout{which}"):
            indices = indices_from(parts.order, state.order, parts.task, start, count)
            examples, prompts = next_examples(
                parts.task, parts.tokenizer, state.policy, start, count, grpo.max_completion_length, indices
            )
            batch_key, expected = jr.fold_in(key, number) if number else key, lengths.expected(examples)
            share, mine = processes.share(count), own_prompts(processes, prompts)
            first_row = grpo.num_generations * share.start
            with naming_the_step(step), processes.alone():
                own = roll_out(parts, target, draft, mine, batch_key, decoding, segments, expected[share], first_row)
        with progress.timed("reward", f"step {step}: rewards{which}"):
            with processes.alone():
                per_function, total, texts, log = judge(parts, examples[share], own, done, start)
            phase, wait = f"step {step}{which}", waiting(decoding, own)
            rewards = gather_rewards(processes, f"{phase}: rewards", per_function, total, log, wait)
            rollouts = gather_rollouts(processes, f"{phase}: rollouts", own, prompts, wait)
            if processes.count > 1:
                texts = [parts.tokenizer.decode(rollouts.completion(row)) for row in range(len(rollouts.group))]
            made = advantages(parts, rewards.per_function, rewards.total, rollouts.group, count)
        seconds = time.perf_counter() - begin
        return SampleBatch(indices, examples, rollouts, rewards, made, texts, seconds)

    batches = [answered(0)]
    while len(batches) < most and sum(int(batch.teaches.sum()) for batch in batches) < count:
        batches.append(answered(len(batches)))
    return _chosen(parts, state, batches, count)


def choose_groups(teaches: Sequence[Bool[np.ndarray, " groups"]], count: int) -> tuple[list[tuple[int, int]], int]:
    """The groups of a step: the first that teach, and where there are not enough of them, the first of the others too.

    **Arguments:**

    - `teaches`: of each batch, which groups teach.
    - `count`: groups of a step.

    **Returns:**

    Each as its batch and its number there, in order; and how many groups are done with, counted over the batches: those
    up to the last that was used, or all where not enough teach.
    """
    places = [(batch, group) for batch, flags in enumerate(teaches) for group in range(len(flags))]
    good = [place for place in places if teaches[place[0]][place[1]]]
    if len(good) >= count:
        return good[:count], places.index(good[count - 1]) + 1
    others = [place for place in places if not teaches[place[0]][place[1]]]
    return sorted([*good, *others[: count - len(good)]]), len(places)


def _chosen(parts: RunParts, state: RunState, batches: list[SampleBatch], count: int) -> StepSample:
    is_dynamic = parts.config.grpo.max_sample_batches > 1
    if is_dynamic:
        chosen, used = choose_groups([batch.teaches for batch in batches], count)
    else:
        chosen, used = [(0, group) for group in range(count)], count
    of_batch = [[group for where, group in chosen if where == number] for number in range(len(batches))]
    first = batches[0]
    if of_batch[0] == list(range(count)):
        scored = ScoredRollouts(first.rollouts, first.rewards.per_function, first.rewards.total, first.advantages)
        examples, texts, extra = first.examples, first.texts, first.rewards.extra
    else:
        scored, examples, texts, extra = _joined(parts, batches, of_batch)
    position = state.position + used
    indices = [index for batch in batches for index in batch.indices][:used]
    means = np.concatenate([_group_means(batch.rewards.total, batch.rollouts.group, count) for batch in batches])[:used]
    order = parts.order.start(state.order, parts.task, position - 1)
    metrics = _logged(batches)
    if is_dynamic:
        metrics |= _cost(batches, scored, count)
    return StepSample(
        examples=examples,
        scored=scored,
        texts=texts,
        extra=extra,
        metrics=metrics,
        decoded=[
            (batch.rollouts, [group for group in range(count) if group not in kept])
            for batch, kept in zip(batches, of_batch, strict=True)
        ],
        position=position,
        order=parts.order.update(order, indices, means),
    )


def _joined(
    parts: RunParts, batches: list[SampleBatch], of_batch: list[list[int]]
) -> tuple[ScoredRollouts, list[Example], list[str], dict[str, list[Any]]]:
    """The chosen groups as one batch, whose advantages are made of its own rewards."""
    rollouts = join_groups([(batch.rollouts, kept) for batch, kept in zip(batches, of_batch, strict=True)])
    pairs = [(batch, rows_of_groups(batch.rollouts.group, kept)) for batch, kept in zip(batches, of_batch, strict=True)]
    examples = [batch.examples[group] for batch, kept in zip(batches, of_batch, strict=True) for group in kept]
    per_function = np.concatenate([batch.rewards.per_function[rows] for batch, rows in pairs])
    total = np.concatenate([batch.rewards.total[rows] for batch, rows in pairs])
    made = advantages(parts, per_function, total, rollouts.group, len(examples))
    texts = [batch.texts[row] for batch, rows in pairs for row in rows]
    names = dict.fromkeys(name for batch, _ in pairs for name in batch.rewards.extra)
    extra: dict[str, list[Any]] = {
        name: [
            batch.rewards.extra[name][row] if name in batch.rewards.extra else None
            for batch, rows in pairs
            for row in rows
        ]
        for name in names
    }
    return ScoredRollouts(rollouts, per_function, total, made), examples, texts, extra


def _group_means(
    rewards: Float[np.ndarray, " rows"], group: Int[np.ndarray, " rows"], num_groups: int
) -> Float[np.ndarray, " groups"]:
    """The mean reward of each group; NaN where no function applied."""
    valid = ~np.isnan(rewards)
    sums = np.bincount(group[valid], rewards[valid], minlength=num_groups)
    counts = np.bincount(group[valid], minlength=num_groups)
    return np.divide(sums, counts, out=np.full(num_groups, np.nan), where=counts > 0)


def _logged(batches: list[SampleBatch]) -> dict[str, float]:
    """What reward functions gave to `log_metric`, the mean over the batches that they gave it in."""
    names = dict.fromkeys(name for batch in batches for name in batch.rewards.metrics)
    found = {
        name: [batch.rewards.metrics[name] for batch in batches if name in batch.rewards.metrics] for name in names
    }
    return {name: float(np.mean(values)) for name, values in found.items()}


def _cost(batches: list[SampleBatch], scored: ScoredRollouts, count: int) -> dict[str, float]:
    """What dynamic sampling took and gave."""
    total = np.concatenate([batch.rewards.total for batch in batches])
    valid = total[~np.isnan(total)]
    group = np.concatenate([batch.rollouts.group + number * count for number, batch in enumerate(batches)])
    moved = scored.rollouts.group[scored.advantages != 0]
    return {
        "dynamic_sampling/batches": float(len(batches)),
        "dynamic_sampling/rows": float(len(total)),
        "dynamic_sampling/reward": float(valid.mean()) if len(valid) else float("nan"),
        "dynamic_sampling/frac_reward_zero_std": frac_reward_zero_std(total, group, count * len(batches)),
        "dynamic_sampling/frac_filled": len(np.unique(moved)) / count,
        "time/dynamic_sampling": sum(batch.seconds for batch in batches[1:]),
    }


def learn_left_out(
    parts: RunParts,
    state: RunState,
    target: AbstractLanguageModel,
    decoded: Sequence[tuple[Rollouts, Sequence[int]]],
    done: int,
) -> tuple[RunState, int]:
    """One update of the draft for each batch of which the step does without some groups: to a draft they are as good.

    The update is as large as that of the step, and its features take a further forward of the target on these rows.
    DONATES the draft and its optimizer's state, where there is such a batch.

    **Arguments:**

    - `target`: the weights that gave the step's features.
    - `decoded`: see [`StepSample`][].
    - `done`: steps that came before.

    **Returns:**

    The state, and how many updates there were.
    """
    fraction, lessons = parts.config.draft.fraction, 0
    for number, (rollouts, groups) in enumerate(decoded):
        if not groups:
            continue
        key = jr.fold_in(step_key(parts.config.seed, done, CHOOSE), number + 1)
        found = rows_of_groups(rollouts.group, groups)
        found = found[np.asarray(jr.permutation(key, len(found)))]
        # Always as many, so that one program serves all: where there are fewer, some come again.
        rows = np.sort(np.resize(found, len(draft_rows(key, len(rollouts.group), fraction))))
        lesson = make_update_batch(rollouts, np.zeros(len(rollouts.group), np.float32)).rows(rows)
        num_prompts = min(len(rows), len(rollouts.prompts.lengths))  # some twice, for the same reason
        lesson = dataclasses.replace(lesson, prompt_rows=np.resize(lesson.prompt_rows, num_prompts), support=None)
        features = features_of(target, lesson, state.draft.layers, parts.mesh)
        everything = np.arange(len(rows))
        state, _ = update_draft(parts, state, target, features, lesson, rollouts.lengths[rows], everything, done + 1)
        lessons += 1
    return state, lessons
