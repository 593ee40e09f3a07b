"""A whole run: from a configuration to a trained policy, its draft, and a folder that tells the story."""

import dataclasses
import time
from pathlib import Path

import equinox as eqx
import jax
from rich.console import Console

from ..config import (
    DraftConfig,
    RunConfig,
    RunParts,
    check_resume,
    default_model_path,
    draft_spec,
    dtype_advice,
    dump_config,
    learning_rate,
    load_config,
    load_policy,
    load_task_and_rewards,
    make_draft,
    make_parts,
    model_name,
)
from ..drafts import remember, save_draft
from ..errors import UserError
from ..grpo import compute_copy
from ..models import locate, save_model
from ..records import (
    RunFolder,
    RunProgress,
    latest_checkpoint,
    load_checkpoint,
    machine,
    read_records,
    summary_table,
)
from ..runtime import Memory, count_compilations, device_memory, progress_console
from ._compare import compare_with_plain
from ._ending import Keeper, on_stop, unless_urgent
from ._inputs import check_inputs, run_inputs
from ._interrupt import StopRequest, stop_requests, stopped_at_once
from ._lessons import CHOOSE, COMPARE, DECODE, learn_lesson, make_lesson, recall_lesson, updates_per_lesson
from ._out_of_memory import out_of_memory_advice
from ._planner import UpdatePlanner
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


def run(
    config: RunConfig, *, resume: bool = False, console: Console | None = None, accept_changes: bool = False
) -> Path:
    """Trains a policy with GRPO, its rollouts decoded speculatively by a draft that keeps learning.

    **Arguments:**

    - `config`: everything; see `RunConfig`.
    - `resume`: go on from the newest checkpoint in the run folder.
    - `console`: where progress goes; by default standard output, and where that is closed or full, nowhere.
    - `accept_changes`: resume also where the task's data or the starting model is not what it was.

    **Returns:**

    The run folder.

    **Raises:**

    `UserError` for whatever the user can mend, and `Stopped` where SIGINT, SIGTERM or SIGHUP has asked for an end. What
    was done until then is in the folder.
    """
    console = console or progress_console()
    progress = RunProgress(console)
    task, _ = load_task_and_rewards(config)
    with RunFolder(Path(config.out), resume) as folder, progress, stopped_at_once(), out_of_memory_advice():
        if resume:
            check_resume(load_config(folder.config_path), config)
        inputs = run_inputs(config, task)
        if resume:
            check_inputs(folder, config, inputs, accept=accept_changes)
        progress.phase(f"loading {model_name(config)}")
        policy, tokenizer = load_policy(config.model.path)
        if not resume:  # A run goes on in the dtype that it began with.
            progress.advise(dtype_advice(config.model.dtype, policy.hidden_size))
        with count_compilations(progress.note) as compilations:
            draft = make_draft(config.draft, policy, config.seed, tokenizer)
            parts = make_parts(config, tokenizer, draft)
            # Frozen, in the dtype of computation; only held where the loss asks for it.
            reference = compute_copy(policy, config.model.dtype) if config.grpo.beta != 0 else None
            state = RunState.fresh(policy, draft, parts.policy_optimizer, parts.draft_optimizer)
            start, state = _start_or_resume(folder, resume, state, config)
            folder.write_config(dump_config(config))
            memory = _memory_at_start(folder, start, state)
            folder.write_machine(start, machine() | {"memory": memory and memory._asdict()})
            planner = UpdatePlanner(memory, progress.note)
            folder.write_inputs(start, inputs)
            del policy, draft

            saved: int | None = start
            is_new = latest_checkpoint(folder.path) is None
            if is_new and config.draft.warms_up and state.draft.train_length > 0:
                state, saved = _warm_up(parts, state, progress), None
            segments = SegmentLog()
            with stop_requests(on_stop(progress)) as stop:
                keeper = Keeper(folder, config, saved, progress, console, stop)
                for step in range(start, config.steps):
                    with keeper.before(step, state), out_of_memory_advice():  # here too: what is done is saved then
                        state = _one_step(
                            parts, state, reference, step, folder, progress, compilations, segments, stop, planner
                        )
                    keeper.after(step + 1, state)
            _finish(parts, state, folder, progress, console, segments)
    return folder.path


def _start_or_resume(folder: RunFolder, resume: bool, state: RunState, config: RunConfig) -> tuple[int, RunState]:
    """The step to start at, and the state to start from."""
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


def _memory_at_start(folder: RunFolder, start: int, state: RunState) -> Memory | None:
    """What the first start of the run had: what is computed depends on it, and goes on as it began."""
    if start > 0:
        before = folder.read_machine(start)
        if before is not None and "memory" in before:
            return None if before["memory"] is None else Memory(**before["memory"])
    jax.block_until_ready(eqx.filter(state, eqx.is_array))
    return device_memory()


def _warm_up(parts: RunParts, state: RunState, progress: RunProgress) -> RunState:
    """Trains the draft on the policy's first, plainly decoded rollouts, before step 0."""
    config = parts.config
    target = compute_copy(state.policy, config.model.dtype)
    lesson, per_lesson = None, updates_per_lesson(parts)
    for update in range(config.draft.warmup):
        number, within = divmod(update, per_lesson)
        if lesson is None or within == 0:
            progress.phase(f"warming up the draft: batch {number + 1} of rollouts")
            lesson = make_lesson(parts, target, state.draft.layers, number, progress.decoding)
            state = recall_lesson(state, lesson)
        progress.phase(f"warming up the draft: update {update + 1} of {config.draft.warmup}")
        state, metrics = learn_lesson(parts, state, target, lesson, update)
        progress.warmed(update + 1, config.draft.warmup, metrics)
    return state


def _one_step(
    parts: RunParts,
    state: RunState,
    reference,
    step: int,
    folder: RunFolder,
    progress: RunProgress,
    compilations,
    segments: SegmentLog,
    stop: StopRequest,
    planner: UpdatePlanner,
) -> RunState:
    """Prompts, rollouts, rewards, policy update, draft update, records."""
    config, grpo = parts.config, parts.config.grpo
    clock = _Clock()

    progress.phase(f"step {step + 1}: rollout")
    examples, prompts = next_examples(
        parts.task,
        parts.tokenizer,
        state.policy,
        step * grpo.prompts_per_step,
        grpo.prompts_per_step,
        grpo.max_completion_length,
    )
    target = compute_copy(state.policy, config.model.dtype)
    draft = compute_copy(state.draft, config.model.dtype)
    key = step_key(config.seed, step, DECODE)
    segments.after_training(parts.length, draft.max_length, state.draft_acceptance)
    rollouts = roll_out(parts, target, draft, prompts, key, unless_urgent(stop, progress.decoding), segments)
    del target, draft
    clock.lap("rollout")

    progress.phase(f"step {step + 1}: rewards")
    scored, texts = score(parts.rewards, parts.tokenizer, examples, rollouts, grpo.scale_rewards, step)
    metrics = {"step": step} | rollout_metrics(scored, parts.rewards.names) | segments.metrics()
    metrics |= vocabulary_metrics(state.draft, rollouts)
    clock.lap("reward")

    progress.phase(f"step {step + 1}: policy update")
    policy, optimizer_state, weights, features, batch, policy_metrics = update_policy(
        parts, state.policy, state.policy_optimizer, reference, scored, learning_rate(config, step), step, planner
    )
    state = RunState(policy, optimizer_state, state.draft, state.draft_optimizer, state.draft_acceptance)
    metrics |= policy_metrics
    jax.block_until_ready(eqx.filter(state.policy, eqx.is_array))
    clock.lap("update")

    if config.draft.learns:
        state = dataclasses.replace(state, draft=remember(state.draft, rollouts))
    if config.draft.learns and state.draft.train_length > 0:
        progress.phase(f"step {step + 1}: draft update")
        rows = draft_rows(step_key(config.seed, step, CHOOSE), len(rollouts.group), config.draft.fraction)
        state, draft_metrics = update_draft(parts, state, weights, features, batch, rollouts.lengths, rows, step)
        metrics |= draft_metrics
        jax.block_until_ready(eqx.filter(state.draft, eqx.is_array))
    clock.lap("draft")

    metrics |= clock.times()
    metrics["num_tokens"] = int(rollouts.lengths.sum() + prompts.lengths[rollouts.group].sum())
    metrics["spec/tokens_per_second"] = float(rollouts.lengths.sum() / metrics["time/rollout"])
    metrics["compile/count"] = compilations.count
    metrics["compile/seconds"] = compilations.seconds
    folder.append_completions(completion_records(step, examples, scored, texts, parts.rewards.names))
    folder.append_metrics(metrics)
    progress.stepped(step, config.steps, metrics)
    return state


def _finish(
    parts: RunParts,
    state: RunState,
    folder: RunFolder,
    progress: RunProgress,
    console: Console,
    segments: SegmentLog,
) -> None:
    """Writes policy and draft for others to load, measures what speculation gave, and sums up."""
    config = parts.config
    progress.phase("saving policy/ and draft/")
    source = locate(config.model.path) if config.model.path else default_model_path()
    save_model(state.policy, folder.policy_path, parts.tokenizer, source if source.is_dir() else None)  # pyright: ignore[reportArgumentType]
    speedup = None
    if config.draft.enabled:
        save_draft(folder.draft_path, state.draft, state.policy, model_name(config), draft_spec(config.draft))
        progress.say("policy/ and draft/ are saved; what follows only measures, and may be stopped")
        segments.after_training(parts.length, state.draft.max_length, state.draft_acceptance)
        speedup = compare_with_plain(
            parts,
            compute_copy(state.policy, config.model.dtype),
            compute_copy(state.draft, config.model.dtype),
            config.steps * config.grpo.prompts_per_step,
            step_key(config.seed, config.steps, COMPARE),
            progress,
            segments,
        )
    progress.close()
    console.print(summary_table(read_records(folder.metrics_path), speedup))
    if speedup and max(speedup.values()) < 1:
        progress.say(f"Speculation did not pay here. {_advice(config.draft)}")
    console.print(f"Run folder: {folder.path}", soft_wrap=True, markup=False, highlight=False)


def _advice(draft: DraftConfig) -> str:
    """To whom speculation did not pay."""
    better = "more draft.warmup, a draft that learned beforehand (specgrpo distill), or draft.kind=hydra or eagle"
    if draft.adaptive:
        return f"Lengths were chosen by what pays, so little was lost. For a gain try {better}."
    return f"draft.adaptive=true drafts only what pays. Or try a shorter draft (draft.length), {better}."


class _Clock:
    """Wall-clock time by phase."""

    def __init__(self):
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self._laps[phase] = now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        times = {f"time/{phase}": seconds for phase, seconds in self._laps.items()}
        return times | {"time/step": self._last - self._start}
