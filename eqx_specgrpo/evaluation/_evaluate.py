"""Completions of held-out prompts, judged: what a policy is worth, as it is."""

import functools as ft
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from .._types import Prompts, Rollouts, StopReason, padding_step
from ..config import RunConfig, check_prompt, pass_ks, rollout_sampling
from ..decoding import (
    AbstractLengthController,
    AbstractStop,
    AbstractVerifier,
    DecodeProgress,
    GreedyMatch,
    decode,
    make_stop,
)
from ..drafts import AbstractDraft
from ..errors import UserError
from ..files import json_line
from ..layout import AbstractDeviceMesh, AbstractProcesses, OneProcess, make_mesh, nothing
from ..models import AbstractLanguageModel, Tokenizer
from ..sampling import AbstractSampling, GreedySampling
from ..tasks import AbstractTask, Example, RewardLog, Rewards, TrainerState, collate
from ._gathered import gather_rewards, gather_rollouts, own_prompts
from ._metrics import ANSWER_COLUMN, NO_ANSWER, completion_metrics, function_metrics, reward_metrics

_RANDOM_NUMBERS = 0x6576616C  # apart from the steps' keys, which are folded in by small numbers


class Evaluation(eqx.Module):
    """What is measured, and how. Nothing in it changes from one measurement to the next, random numbers included: what
    differs between two of them is the policy.

    **Arguments:**

    - `examples`: the items.
    - `prompts`: theirs, as token ids.
    - `rewards`: what judges.
    - `tokenizer`: of the policy.
    - `sampling`, `verifier`, `length`, `stop`: of the decoder.
    - `samples`: completions of each prompt.
    - `max_completion_length`: of the longest, in tokens.
    - `prompts_at_once`: how many prompts are decoded together.
    - `max_rows`: how many completions, at most; `None`: all of those prompts'.
    - `threshold`: a completion is right if its reward is at least so much.
    - `seed`: of the completions, and of the intervals.
    - `mesh`: the devices that decode.
    """

    examples: tuple[Example, ...]
    prompts: Prompts
    rewards: Rewards
    tokenizer: Tokenizer
    sampling: AbstractSampling
    verifier: AbstractVerifier
    length: AbstractLengthController
    stop: AbstractStop
    samples: int
    max_completion_length: int
    prompts_at_once: int
    max_rows: int | None
    threshold: float
    seed: int
    mesh: AbstractDeviceMesh


class EvaluationResult(NamedTuple):
    """What came of an evaluation.

    **Arguments:**

    - `metrics`: by name, each with `eval/` in front.
    - `completions`: one JSON-able object a completion.
    """

    metrics: dict[str, float]
    completions: list[dict[str, Any]]


def make_evaluation(
    config: RunConfig,
    held_out: tuple[AbstractTask, Rewards],
    tokenizer: Tokenizer,
    target: AbstractLanguageModel,
    verifier: AbstractVerifier,
    length: AbstractLengthController,
) -> Evaluation:
    """What `[eval]` asks for.

    **Arguments:**

    - `held_out`: the items, and what judges; see [`eqx_specgrpo.config.load_held_out`][].
    - `tokenizer`, `target`: the policy's; of `target` only the longest sequence counts.
    - `verifier`, `length`: of the run. At temperature 0 the verifier is `GreedyMatch`.

    **Raises:**

    `UserError` if a prompt has no tokens or too many.
    """
    task, rewards = held_out
    evaluation, grpo = config.eval, config.grpo
    tokenizer = tokenizer.with_chat_template_kwargs(grpo.chat_template_kwargs)
    samples = evaluation.num_samples(grpo.num_generations)
    greedy = evaluation.temperature == 0
    temperature = grpo.temperature if evaluation.temperature is None else evaluation.temperature
    longest = evaluation.max_completion_length or grpo.max_completion_length
    assert task.size is not None
    examples = tuple(task.example(index) for index in range(task.size))
    encoded = _encoded(examples, tokenizer, target, longest)
    prompts = Prompts.from_lists(encoded, multiple_of=padding_step(max(map(len, encoded))))
    at_once = max(1, grpo.prompts_per_step * grpo.num_generations // samples)
    return Evaluation(
        examples=examples,
        prompts=prompts,
        rewards=rewards,
        tokenizer=tokenizer,
        sampling=GreedySampling() if greedy else rollout_sampling(grpo.model_copy(update={"temperature": temperature})),
        verifier=GreedyMatch() if greedy else verifier,
        length=length,
        stop=make_stop(grpo.stop, tokenizer),
        samples=samples,
        max_completion_length=longest,
        prompts_at_once=min(at_once, len(examples)),
        max_rows=grpo.max_rows,
        threshold=evaluation.threshold,
        seed=config.seed,
        mesh=make_mesh(config.devices.model).for_rollouts(),
    )


def _encoded(
    examples: Sequence[Example], tokenizer: Tokenizer, target: AbstractLanguageModel, longest: int
) -> list[list[int]]:
    rows = []
    for number, example in enumerate(examples):
        try:
            ids = tokenizer.encode_prompt(example.prompt)
            check_prompt(len(ids), number, target, longest)
        except UserError as error:
            raise UserError(f"the evaluation's item {number}: {error}") from error
        if not ids:
            raise UserError(f"the evaluation's item {number} has a prompt without tokens: give it some text")
        rows.append(ids)
    return rows


def evaluate(
    evaluation: Evaluation,
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    where: TrainerState,
    on_progress: Callable[[DecodeProgress], None],
    length_state: Any = None,
    processes: AbstractProcesses | None = None,
) -> EvaluationResult:
    """Measures a policy.

    It takes and leaves nothing that training goes on with: random numbers, draft and length controller are as they
    were, and no draft learns from held-out completions.

    **Arguments:**

    - `evaluation`: what to measure.
    - `target`, `draft`: in the dtype of computation.
    - `where`: what reward functions are told.
    - `on_progress`: called between the decoder's segments.
    - `length_state`: what the length controller has learned so far.
    - `processes`: of the run, all of which evaluate together: each a part of the prompts, on devices of its own.
    """
    begin = time.perf_counter()
    processes = OneProcess() if processes is None else processes
    phase = f"step {where.global_step}: evaluation"
    key = jr.fold_in(jr.key(evaluation.seed), _RANDOM_NUMBERS)
    batches = []
    for number, prompts in enumerate(_batches(evaluation)):
        batch_key = jr.fold_in(key, number)
        own = own_prompts(processes, prompts)
        first_row = evaluation.samples * processes.share(len(prompts.lengths)).start
        with processes.alone():
            rollouts, length_state = _roll_out(
                evaluation, target, draft, own, batch_key, on_progress, length_state, first_row
            )
        done = DecodeProgress(0, len(rollouts.group), int(rollouts.lengths.sum()))
        waiting = ft.partial(on_progress, done)
        batches.append(gather_rollouts(processes, f"{phase}, batch {number + 1}", rollouts, prompts, waiting))
    return _judged(evaluation, batches, where, begin, processes)


def _batches(evaluation: Evaluation) -> Iterator[Prompts]:
    """So many prompts at a time. The last ones are filled up with prompts from the beginning, whose completions are
    dropped: another number of rows would be another program."""
    count, at_once = len(evaluation.examples), evaluation.prompts_at_once
    for first in range(0, count, at_once):
        which = np.arange(first, first + at_once) % count
        yield Prompts(evaluation.prompts.tokens[which], evaluation.prompts.lengths[which])


def _roll_out(
    evaluation: Evaluation,
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    prompts: Prompts,
    key: Key[Array, ""],
    on_progress: Callable[[DecodeProgress], None],
    length_state: Any,
    first_row: int,
) -> tuple[Rollouts, Any]:
    def on_segment(_: Any, new_state: Any) -> None:
        nonlocal length_state
        length_state = new_state

    rollouts = decode(
        target,
        prompts,
        draft=draft,
        verifier=evaluation.verifier,
        length=evaluation.length,
        length_state=length_state,
        sampling=evaluation.sampling,
        key=key,
        max_new_tokens=evaluation.max_completion_length,
        eos_ids=evaluation.tokenizer.eos_ids,
        stop=evaluation.stop,
        samples=evaluation.samples,
        max_rows=evaluation.max_rows,
        mesh=evaluation.mesh,
        first_row=first_row,
        on_progress=on_progress,
        on_segment=on_segment,
    )
    return rollouts, length_state


def _judged(
    evaluation: Evaluation,
    batches: Sequence[Rollouts],
    where: TrainerState,
    begin: float,
    processes: AbstractProcesses,
) -> EvaluationResult:
    count, samples = len(evaluation.examples), evaluation.samples
    rows = [(batch, row) for batch in batches for row in range(len(batch.group))][: count * samples]
    ids = [batch.completion(row) for batch, row in rows]
    texts = [evaluation.tokenizer.decode(completion) for completion in ids]
    items = processes.share(count)  # those that this process judges
    own = slice(items.start * samples, items.stop * samples)
    prompts, columns = collate([example for example in evaluation.examples[items] for _ in range(samples)])
    log = RewardLog(len(ids[own]))
    with processes.alone():
        per_function, total = evaluation.rewards(prompts, texts[own], ids[own], columns, where.global_step, where, log)
    phase = f"step {where.global_step}: rewards of the evaluation"
    per_function, total, extra, _ = gather_rewards(processes, phase, per_function, total, log, nothing)
    rewards = total.reshape(count, samples)
    with np.errstate(invalid="ignore"):  # NaN, where no function applied, is not right
        correct = rewards >= evaluation.threshold
    answers = _answers(extra, count, samples)
    lengths = np.array([batch.lengths[row] for batch, row in rows])
    stop_reasons = np.array([batch.stop_reasons[row] for batch, row in rows])
    metrics = reward_metrics(rewards, correct, answers, pass_ks(samples), evaluation.seed)
    metrics |= function_metrics(per_function, evaluation.rewards.names)
    metrics |= completion_metrics(lengths, stop_reasons, [batch.statistics for batch in batches])
    metrics["eval/num_prompts"], metrics["eval/num_samples"] = float(count), float(samples)
    metrics["eval/runtime"] = time.perf_counter() - begin
    return EvaluationResult(metrics, _records(evaluation, rows, texts, per_function, total, extra))


def _answers(extra: Mapping[str, Sequence[Any]], count: int, samples: int) -> list[list[str | None]] | None:
    """What each completion answers, if a reward function has told."""
    if ANSWER_COLUMN not in extra:
        return None
    flat = [None if answer in (None, NO_ANSWER) else json_line(answer) for answer in extra[ANSWER_COLUMN]]
    return [flat[item * samples : (item + 1) * samples] for item in range(count)]


def _records(
    evaluation: Evaluation,
    rows: Sequence[tuple[Rollouts, int]],
    texts: Sequence[str],
    per_function: Float[np.ndarray, "rows functions"],
    total: Float[np.ndarray, " rows"],
    extra: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """One object a completion, with what the reward functions logged; our own keys count before theirs."""
    names = [f"rewards/{name}" for name in evaluation.rewards.names]
    return [
        {
            **{name: values[place] for name, values in extra.items()},
            "item": place // evaluation.samples,
            "prompt": evaluation.examples[place // evaluation.samples].prompt,
            "completion": texts[place],
            "length": int(batch.lengths[row]),
            "stop_reason": StopReason(int(batch.stop_reasons[row])).name.lower(),
            **dict(zip(names, per_function[place].tolist(), strict=True)),
            "reward": float(total[place]),
        }
        for place, (batch, row) in enumerate(rows)
    ]
