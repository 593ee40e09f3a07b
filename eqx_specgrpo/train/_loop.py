"""A whole run: from a configuration to a trained policy, its draft, and a folder that tells the story."""

import dataclasses
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import equinox as eqx
import jax
from rich.console import Console

from ..config import (
    RunConfig,
    RunParts,
    check_resume,
    dtype_advice,
    dump_config,
    learning_rate,
    load_config,
    load_policy,
    load_task_and_rewards,
    make_draft,
    make_parts,
    model_name,
    rate_advice,
)
from ..decoding import FixedLength
from ..drafts import remember
from ..errors import UserError
from ..grpo import compute_copy
from ..models import AbstractLanguageModel
from ..records import (
    RunFolder,
    RunProgress,
    latest_checkpoint,
    load_checkpoint,
    machine,
    save_checkpoint,
    step_times,
)
from ._finish import finish, sum_up
from ._header import header
from ._interrupt import interrupts
from ._lessons import CHOOSE, DECODE, learn_lesson, make_lesson, recall_lesson, updates_per_lesson
from ._out_of_memory import out_of_memory_advice
from ._segments import SegmentLog
from ._state import RunState
from ._step import (
    completion_records,
    draft_rows,
    next_examples,
    roll_out,
    rollout_metrics,
    score,
    step_key,
    update_draft,
    update_policy,
    vocabulary_metrics,
)

_ON_CTRL_C = "Ctrl-C: finishing this step, then writing a checkpoint (press again to stop at once)"


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Path:
    """Trains a policy with GRPO, its rollouts decoded speculatively by a draft that keeps learning.

    **Arguments:**

    - `config`: everything; see `RunConfig`.
    - `resume`: go on from the newest checkpoint in the run folder.
    - `console`: where progress goes.

    **Returns:**

    The run folder.

    **Raises:**

    `UserError` for whatever the user can mend. What was done until then is in the folder.
    """
    console = console or Console()
    load_task_and_rewards(config)
    with RunFolder(Path(config.out), resume) as folder, RunProgress(console) as progress, out_of_memory_advice():
        before = load_config(folder.config_path) if resume else config
        check_resume(before, config)
        with progress.timed("loading", f"loading {model_name(config)}"):
            parts, state, reference = _load(config, resume, progress)
            start, state = _start_or_resume(folder, resume, state, config)
            progress.advise(rate_advice(before, config, start))
            folder.write_config(dump_config(config))
            folder.write_machine(start, machine())
        for line in header(parts, state, start):
            progress.say(line)
        segments, comparison = SegmentLog(), None
        with _times_written(folder, progress, start + 1):
            if start == 0 and config.draft.warms_up and state.draft.train_length > 0:
                with progress.timed("warm-up", "warming up the draft"):
                    state = _warm_up(parts, state, progress)
            done, state = _steps(parts, state, reference, start, folder, progress, segments)
            if done == config.steps:
                comparison = finish(parts, state, folder, progress, segments)
        progress.close()
        if done == config.steps:
            sum_up(config, folder, comparison, console)
        else:
            console.print(
                f"Stopped after step {done} of {config.steps}; nothing is lost. Go on with: "
                f"specgrpo run --resume --out {shlex.quote(config.out)}",
                soft_wrap=True,  # to be copied: a line break or markup would spoil it
                markup=False,
                highlight=False,
            )
    return folder.path


@contextmanager
def _times_written(folder: RunFolder, progress: RunProgress, from_step: int) -> Iterator[None]:
    """Leaves in `times.jsonl` where the time went, however the `with` block ends."""
    earlier = folder.times()
    try:
        yield
    except BaseException:
        with suppress(UserError):  # the other error is the one to tell
            folder.write_times([*earlier, progress.times.record(from_step)])
        raise
    folder.write_times([*earlier, progress.times.record(from_step)])


def _load(
    config: RunConfig, resume: bool, progress: RunProgress
) -> tuple[RunParts, RunState, AbstractLanguageModel | None]:
    """The parts, the state before the first step, and the reference, which only some losses ask for.

    The reference is the policy as it begins. It stands still, so it is in the dtype of computation.
    """
    policy, tokenizer = load_policy(config.model.path)
    if not resume:  # A run goes on in the dtype that it began with.
        progress.advise(dtype_advice(config.model.dtype, policy.hidden_size))
    draft = make_draft(config.draft, policy, config.seed, tokenizer)
    parts = make_parts(config, tokenizer, draft)
    reference = compute_copy(policy, config.model.dtype) if config.grpo.beta != 0 else None
    return parts, RunState.fresh(policy, draft, parts.policy_optimizer, parts.draft_optimizer), reference


def _start_or_resume(folder: RunFolder, resume: bool, state: RunState, config: RunConfig) -> tuple[int, RunState]:
    """How many steps are done, and the state after them."""
    if not resume:
        return 0, state
    checkpoint = latest_checkpoint(folder.path)
    if checkpoint is None:
        folder.rewind(0)
        return 0, state
    trees, meta = load_checkpoint(checkpoint, state.trees())
    if meta["step"] > config.steps:
        raise UserError(
            f"steps = {config.steps}, but the run in {folder.path} has done {meta['step']}: --steps is the total, give "
            "a larger one"
        )
    folder.rewind(meta["step"])
    return meta["step"], RunState.from_trees(trees)


def _steps(
    parts: RunParts,
    state: RunState,
    reference: AbstractLanguageModel | None,
    start: int,
    folder: RunFolder,
    progress: RunProgress,
    segments: SegmentLog,
) -> tuple[int, RunState]:
    """The steps from `start` to the last, or to the one in which Ctrl-C was pressed; how many are done, and the state
    after them, which is in a checkpoint."""
    config = parts.config
    done = start
    with interrupts(lambda: progress.say(_ON_CTRL_C)) as interrupted:
        while done < config.steps and not interrupted():
            try:
                with out_of_memory_advice():  # here too: the steps before are saved then
                    state = _one_step(parts, state, reference, done, folder, progress, segments)
            except UserError:
                if done > start:
                    _save_finished(state, done, folder, progress)
                raise
            done += 1
            if interrupted() or done == config.steps or done % config.save_steps == 0:
                with progress.timed("checkpoints", "writing the checkpoint"):
                    save_checkpoint(folder.path, done, state.trees(), {})
    return done, state


def _save_finished(state: RunState, step: int, folder: RunFolder, progress: RunProgress) -> None:
    """Before an error in a step ends the run: a checkpoint of the steps before it, unless its updates had begun."""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array))):
        progress.note("an update of this step had been made already: --resume goes on from the last checkpoint")
        return
    with suppress(UserError):  # A full disk, perhaps, and that may be what the run stops for.
        saved = save_checkpoint(folder.path, step, state.trees(), {})
        progress.note(f"the steps before are in {saved}; once the cause is mended, go on with --resume")


def _warm_up(parts: RunParts, state: RunState, progress: RunProgress) -> RunState:
    """Trains the draft on the policy's first rollouts, before the first step.

    They are decoded by the programs that the steps run, so that no others are compiled: with the draft, of a fixed
    length, though it has learned nothing yet; or plainly, if the length adapts and begins so.
    """
    config = parts.config
    decoding = dataclasses.replace(parts, length=FixedLength(0)) if config.draft.adaptive else parts
    target = compute_copy(state.policy, config.model.dtype)
    lesson, per_lesson = None, updates_per_lesson(parts)
    for update in range(config.draft.warmup):
        number, within = divmod(update, per_lesson)
        if lesson is None or within == 0:
            progress.phase(f"warming up the draft: batch {number + 1} of rollouts")
            draft = compute_copy(state.draft, config.model.dtype)
            lesson = make_lesson(decoding, target, draft, draft.layers, number, progress.decoding)
            state = recall_lesson(state, lesson)
        progress.phase(f"warming up the draft: update {update + 1} of {config.draft.warmup}")
        state, metrics = learn_lesson(parts, state, target, lesson, update)
        progress.warmed(update + 1, config.draft.warmup, metrics)
    return state


def _one_step(
    parts: RunParts,
    state: RunState,
    reference: AbstractLanguageModel | None,
    done: int,
    folder: RunFolder,
    progress: RunProgress,
    segments: SegmentLog,
) -> RunState:
    """Prompts, rollouts, rewards, policy update, draft update, records.

    **Arguments:**

    - `done`: steps that came before. Keys, the place in the data and the learning rate derive from it.
    """
    config, grpo = parts.config, parts.config.grpo
    step = done + 1  # as it is counted wherever it is shown or written
    progress.times.laps()  # What was before the step is not its own.

    with progress.timed("rollout", f"step {step}: rollout"):
        examples, prompts = next_examples(
            parts.task,
            parts.tokenizer,
            state.policy,
            done * grpo.prompts_per_step,
            grpo.prompts_per_step,
            grpo.max_completion_length,
        )
        target = compute_copy(state.policy, config.model.dtype)
        draft = compute_copy(state.draft, config.model.dtype)
        key = step_key(config.seed, done, DECODE)
        segments.after_training(parts.length, draft.max_length, state.draft_acceptance)
        rollouts = roll_out(parts, target, draft, prompts, key, progress.decoding, segments)
        del target, draft

    with progress.timed("reward", f"step {step}: rewards"):
        scored, texts, log = score(parts, examples, rollouts, done)
        metrics = {"step": step} | rollout_metrics(scored, parts.rewards.names) | segments.metrics()
        metrics |= vocabulary_metrics(state.draft, rollouts) | log.metrics

    with progress.timed("update", f"step {step}: policy update"):
        policy, optimizer_state, weights, features, batch, policy_metrics = update_policy(
            parts, state.policy, state.policy_optimizer, reference, scored, learning_rate(config, done), step
        )
        state = RunState(policy, optimizer_state, state.draft, state.draft_optimizer, state.draft_acceptance)
        metrics |= policy_metrics
        jax.block_until_ready(eqx.filter(state.policy, eqx.is_array))

    if config.draft.learns:
        state = dataclasses.replace(state, draft=remember(state.draft, rollouts))
    if config.draft.learns and state.draft.train_length > 0:
        with progress.timed("draft", f"step {step}: draft update"):
            rows = draft_rows(step_key(config.seed, done, CHOOSE), len(rollouts.group), config.draft.fraction)
            state, draft_metrics = update_draft(parts, state, weights, features, batch, rollouts.lengths, rows, step)
            metrics |= draft_metrics
            jax.block_until_ready(eqx.filter(state.draft, eqx.is_array))

    metrics |= step_times(progress.times.laps())
    metrics["num_tokens"] = int(rollouts.lengths.sum() + prompts.lengths[rollouts.group].sum())
    metrics["spec/tokens_per_second"] = float(rollouts.lengths.sum() / metrics["time/rollout"])
    metrics["compile/count"] = progress.compilations.count
    metrics["compile/seconds"] = progress.compilations.seconds
    with progress.timed("records", f"step {step}: records"):
        records = completion_records(step, examples, scored, texts, parts.rewards.names, log.extra)
        folder.append_completions(records)
        folder.append_metrics(metrics)
        progress.stepped(step, config.steps, metrics)
    return state
