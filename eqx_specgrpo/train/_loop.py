"""A whole run: from a configuration to a trained policy, its draft, and a folder that tells the story."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from rich.console import Console

from ..config import (
    ConfigLike,
    Given,
    Policy,
    RewardLike,
    RunConfig,
    RunParts,
    check_draft_options,
    check_resume,
    dtype_advice,
    dump_config,
    given_and_named,
    learning_rate,
    load_config,
    load_held_out,
    load_task_and_rewards,
    load_trained_policy,
    lora_advice,
    make_draft,
    make_parts,
    model_name,
    rate_advice,
    run_mesh,
    with_absolute_paths,
    with_steps_of_epochs,
)
from ..decoding import CompileAtOnce, CompileSparingly, FixedLength
from ..drafts import AbstractDraft
from ..errors import UserError
from ..grpo import compute_copy
from ..layout import AbstractProcesses, Layout, OneProcess
from ..models import AbstractLanguageModel
from ..records import (
    AbstractRunFolder,
    EvaluationRecords,
    RunProgress,
    Trackers,
    check_trackers,
    latest_checkpoint,
    load_checkpoint,
    machine,
    read_steps,
    step_times,
)
from ..runtime import Memory, ProgramMemory, device_memory, most_for_programs, progress_console
from ._callbacks import AbstractCallback, RunView, as_callback
from ._draft_guard import DraftGuard
from ._draft_lessons import teach_draft
from ._draft_step import found_acceptance
from ._ending import Keeper, on_stop, unless_urgent
from ._evaluation import make_evaluator
from ._finish import finish, sum_up
from ._header import header
from ._inputs import check_inputs, run_inputs
from ._interrupt import StopRequest, stop_requests, stopped_at_once
from ._lessons import learn_lesson, make_lesson, recall_lesson, updates_per_warm_up_lesson
from ._loss_state import current_reference, fixed_reference, with_loss_state, with_update
from ._out_of_memory import bound_programs, out_of_memory_advice
from ._planner import UpdatePlanner
from ._policy import whole_model
from ._prompt_lengths import PromptLengths
from ._result import RunResult, metric_columns
from ._sample import sample_step
from ._segments import SegmentLog
from ._state import RunState
from ._step import update_policy
from ._step_records import completion_records, rollout_metrics, vocabulary_metrics
from ._together import check_alike, check_own_devices, least_memory, run_folder, step_fingerprint, telling_others
from ._tracked import track_summary, tracked


def run(
    config: ConfigLike,
    *,
    task: Any = None,
    rewards: RewardLike | Sequence[RewardLike] | None = None,
    callbacks: AbstractCallback | Sequence[AbstractCallback] = (),
    policy: Policy | None = None,
    draft: AbstractDraft | str | None = None,
    resume: bool = False,
    console: Console | None = None,
    accept_changes: bool = False,
    processes: AbstractProcesses | None = None,
) -> RunResult:
    """Trains a policy with GRPO, its rollouts decoded speculatively by a draft that keeps learning.

    An object that is handed over takes the place of what the configuration names. `config.toml` in the run folder
    records its qualified name. The object cannot be found again by that name, so a resume has to be handed the object
    as well. A function of a module that can be imported is recorded so that it is found.

    **Arguments:**

    - `config`: the path of a TOML file; a dictionary of keys, nested (`{"grpo": {"beta": 0.01}}`) or dotted
        (`{"grpo.beta": 0.01}`), over the defaults of [`eqx_specgrpo.load_config`][] (with `resume`, over the
        configuration of the run in its `out`); or what `load_config` returns.
    - `task`: in TRL's convention a sequence of dictionaries, or a `datasets.Dataset`; a task; or a name, as
        `task.name`. The options of `[task]` for files (`task.columns` and so on) apply to rows.
    - `rewards`: functions with TRL's signature, `async` ones too, and names, one or several; weighted by
        `reward.weights`.
    - `callbacks`: called at the beginning, after each step and each evaluation, and at the end.
    - `policy`: a model and its tokenizer, as [`eqx_specgrpo.load_pretrained`][] returns them. A copy is trained.
    - `draft`: a draft module, of which a copy learns on, without a warm-up; or what `--draft` takes.
    - `resume`: whether to go on from the newest checkpoint in the run folder.
    - `console`: where progress goes; by default standard output, and where that is closed or full, nowhere.
    - `accept_changes`: whether to resume even if the task's data or the starting model has changed.
    - `processes`: that do the run together, from [`eqx_specgrpo.layout.join_processes`][]; each calls this with the
        same arguments. By default this one alone. Only the first one writes records and shows progress; callbacks are
        called in all of them.

    **Returns:**

    The run folder, the metrics of all steps as columns, and the trained policy and draft.

    **Raises:**

    `UserError` for errors that a user can correct, and `Stopped` after SIGINT, SIGTERM or SIGHUP. The steps that were
    done until then are in the folder.
    """
    processes = OneProcess() if processes is None else processes
    console = (console or progress_console()) if processes.is_first else Console(quiet=True)
    progress = RunProgress(console)
    config, given = given_and_named(config, task=task, rewards=rewards, policy=policy, draft=draft, resume=resume)
    del task, rewards, policy, draft
    callback = as_callback(callbacks)
    config = with_absolute_paths(config)  # what the run folder keeps is found again from anywhere
    prompts, _ = load_task_and_rewards(config, given)
    held_out = load_held_out(config, given)
    config = with_steps_of_epochs(config, prompts)
    check_draft_options(config.draft)
    check_trackers(config.tracking)
    with (
        telling_others(processes),
        run_folder(Path(config.out), resume, processes) as folder,
        progress,
        stopped_at_once(),
        out_of_memory_advice(),
    ):
        before = load_config(folder.config_path) if resume else config
        inputs = run_inputs(config, prompts, None if held_out is None else held_out[0], given)
        if resume:
            check_resume(before, config)
            check_inputs(folder, config, inputs, accept=accept_changes)
        check_alike(processes, config, inputs, folder)
        with progress.timed("loading", f"loading {model_name(config)}"):
            parts, state, reference = _load(config, given, resume, progress, processes)
            check_own_devices(parts)
            evaluator = make_evaluator(parts, held_out, state.policy, folder.path, progress)
            start, state = _start_or_resume(folder, resume, state, config)
            state = state.laid_out(parts.mesh)
            progress.advise(rate_advice(before, config, start))
            folder.write_config(dump_config(config))
            memory = _memory_at_start(folder, start, state, processes)
            folder.write_machine(start, machine() | {"memory": memory and memory._asdict()})
            planner = UpdatePlanner(memory, progress.note)
            folder.write_inputs(start, inputs)
            processes.exchange("the records are there", b"")
        for line in [*header(parts, state, start), *evaluator.header()]:
            progress.say(line)
        callback.begin(_view(parts, state, folder, start))
        with (
            _times_written(folder, progress, start + 1),
            tracked(config, folder, progress, start, processes.is_first) as trackers,
        ):
            saved: int | None = start
            is_new = latest_checkpoint(folder.path) is None
            if is_new and config.draft.warms_up and state.draft.train_length > 0:
                with progress.timed("warm-up", "warming up the draft"):
                    state, saved = _warm_up(parts, state, progress), None
            # With a length of its own choice what is computed in which batch depends on times anyway.
            adapts = config.draft.enabled and config.draft.adaptive
            segments = SegmentLog(parts.length, CompileSparingly() if adapts else CompileAtOnce())
            lengths = PromptLengths.of_run(folder.completions_path)
            programs = ProgramMemory(most_for_programs())
            guard = DraftGuard(read_steps(folder.metrics_path) if start > 0 else ())
            with stop_requests(on_stop(progress), processes) as stop:
                keeper = Keeper(folder, config, saved, progress, console, stop, processes)
                for done in range(start, config.steps + 1):
                    with keeper.before(done, state), out_of_memory_advice():  # here too: what is done is saved then
                        measured = evaluator.after(done, state, segments, stop)
                        trackers.step(done, measured)
                        if measured:
                            callback.evaluate(_view(parts, state, folder, done), measured)
                    keeper.pause(done, state, "evaluated")
                    if done == config.steps:
                        break
                    with keeper.before(done, state), out_of_memory_advice():
                        state, metrics = _one_step(
                            parts,
                            state,
                            reference,
                            done,
                            folder,
                            trackers,
                            progress,
                            segments,
                            lengths,
                            stop,
                            planner,
                            guard,
                        )
                    keeper.after(done + 1, state)
                    bound_programs(programs, segments.compiler, progress)
                    with keeper.before(done + 1, state):
                        callback.step(_view(parts, state, folder, done + 1), metrics)
            comparison = finish(parts, state, folder, progress, segments)
            track_summary(trackers, folder, progress, start, comparison)
        processes.exchange("all is written", b"")
        progress.close()
        sum_up(config, folder, comparison, console)
        callback.end(_view(parts, state, folder, config.steps))
        metrics = metric_columns(folder.metrics_path)
    return RunResult(folder.path, metrics, state.policy, parts.tokenizer, state.draft)


def _view(parts: RunParts, state: RunState, folder: AbstractRunFolder, done: int) -> RunView:
    is_first = parts.processes.is_first
    return RunView(parts.config, folder.path, done, state.policy, state.draft, parts.tokenizer, is_first)


@contextmanager
def _times_written(folder: AbstractRunFolder, progress: RunProgress, from_step: int) -> Iterator[None]:
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
    config: RunConfig, given: Given, resume: bool, progress: RunProgress, processes: AbstractProcesses
) -> tuple[RunParts, RunState, AbstractLanguageModel | None]:
    """The parts, the state before the first step, and the reference, which only some losses ask for.

    A reference that stands still is the policy as it begins, in the dtype of computation.
    """
    policy, tokenizer = load_trained_policy(config, given, run_mesh(config))
    if not resume:  # A run goes on in the dtype, and at the rate, that it began with.
        progress.advise(dtype_advice(config.model.dtype, policy.hidden_size))
        progress.advise(lora_advice(config.lora, config.grpo.learning_rate))
    draft = make_draft(config.draft, whole_model(policy), config.seed, tokenizer, given.start_draft())
    parts = make_parts(config, tokenizer, draft, given=given, processes=processes)
    policy, draft = parts.mesh.lay_out((policy, draft), Layout.MASTER)
    reference = fixed_reference(parts, policy)
    state = RunState.fresh(policy, draft, parts.policy_optimizer, parts.draft_optimizer).laid_out(parts.mesh)
    state = dataclasses.replace(with_loss_state(parts, state), order=parts.order.init(parts.task))
    return parts, state, reference


def _start_or_resume(
    folder: AbstractRunFolder, resume: bool, state: RunState, config: RunConfig
) -> tuple[int, RunState]:
    """How many steps are done, and the state after them."""
    if not resume:
        return 0, state
    checkpoint = latest_checkpoint(folder.path)
    if checkpoint is None:
        folder.rewind(0)
        EvaluationRecords(folder.path).rewind(0)
        return 0, state
    trees, meta = load_checkpoint(checkpoint, state.trees())
    if meta["step"] > config.steps:
        raise UserError(
            f"steps = {config.steps}, but the run in {folder.path} has done {meta['step']}: --steps is the total, give "
            "a larger one"
        )
    folder.rewind(meta["step"])
    EvaluationRecords(folder.path).rewind(meta["step"])
    state = state.with_trees(trees).with_numbers(meta, meta["step"], config.grpo.prompts_per_step)
    return meta["step"], state


def _memory_at_start(
    folder: AbstractRunFolder, start: int, state: RunState, processes: AbstractProcesses
) -> Memory | None:
    """What the first start of the run had: what is computed depends on it, and goes on as it began."""
    if start > 0:
        before = folder.read_machine(start)
        if before is not None and "memory" in before:
            return None if before["memory"] is None else Memory(**before["memory"])
    jax.block_until_ready(eqx.filter(state, eqx.is_array))
    return least_memory(processes, device_memory())


def _warm_up(parts: RunParts, state: RunState, progress: RunProgress) -> RunState:
    """Trains the draft on the policy's first rollouts, before the first step.

    They are decoded by the programs that the steps run, so that no others are compiled: with the draft, of a fixed
    length, though it has learned nothing yet; or plainly, if the length adapts and begins so.
    """
    config = parts.config
    decoding = dataclasses.replace(parts, length=FixedLength(0)) if config.draft.adaptive else parts
    target = compute_copy(state.policy, config.model.dtype, parts.mesh)
    lesson, per_lesson = None, updates_per_warm_up_lesson(config.draft)
    for update in range(config.draft.warmup):
        number, within = divmod(update, per_lesson)
        if lesson is None or within == 0:
            progress.phase(f"warming up the draft: batch {number + 1} of rollouts")
            draft = compute_copy(state.draft, config.model.dtype, parts.mesh)
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
    folder: AbstractRunFolder,
    trackers: Trackers,
    progress: RunProgress,
    segments: SegmentLog,
    lengths: PromptLengths,
    stop: StopRequest,
    planner: UpdatePlanner,
    guard: DraftGuard,
) -> tuple[RunState, dict[str, float | int]]:
    """Prompts, rollouts, rewards, policy update, draft update, records; the state after it, and its metrics.

    **Arguments:**

    - `done`: steps that came before. Keys and the learning rate derive from it.
    """
    config, grpo = parts.config, parts.config.grpo
    step = done + 1  # as it is counted wherever it is shown or written
    progress.times.laps()  # What was before the step is not its own.
    compiled = progress.compilations.seconds

    with progress.timed("rollout", f"step {step}: rollout"):
        target = compute_copy(state.policy, config.model.dtype, parts.mesh)
        copies = parts.mesh.copies((target, compute_copy(state.draft, config.model.dtype, parts.mesh)))
        segments.after_training(state.draft.max_length, state.draft_acceptance, done, config.steps - done)
        guard.begin(state.draft, step)
    decoding = unless_urgent(stop, progress.decoding, parts.processes)
    sample = sample_step(parts, state, *copies, done, progress, segments, lengths, decoding)
    del copies
    weights = target if grpo.num_iterations == 1 else None  # with several, it would be held beside later ones
    del target
    scored, rollouts = sample.scored, sample.scored.rollouts
    metrics = {"step": step} | rollout_metrics(scored, parts.rewards.names) | segments.metrics()
    metrics |= vocabulary_metrics(state.draft, rollouts) | sample.metrics

    parts.processes.agree(f"step {step}: update", step_fingerprint(step, state.position, scored))
    with progress.timed("update", f"step {step}: policy update"):
        reference = current_reference(parts, state, reference)
        rate = learning_rate(config, done)
        update = update_policy(
            parts, state.policy, state.policy_optimizer, reference, scored, rate, step, state.entropy, weights, planner
        )
        del weights
        state = with_update(parts, state, update.policy, update.optimizer_state, update.entropy, step)
        metrics |= update.metrics
        jax.block_until_ready(eqx.filter(state.policy, eqx.is_array))

    state = dataclasses.replace(state, position=sample.position, order=sample.order)
    saved = metrics.get("draft/seconds_saved")
    state, draft_metrics = teach_draft(parts, state, sample, update, done, guard, saved, segments.seconds, progress)
    metrics |= draft_metrics
    segments.learned(found_acceptance(draft_metrics))

    parts.processes.agree(f"step {step}: updated", {"loss": metrics["loss"], "gradient norm": metrics["grad_norm"]})
    metrics |= step_times(progress.times.laps())
    metrics["num_tokens"] = int(rollouts.lengths.sum() + rollouts.prompts.lengths[rollouts.group].sum())
    metrics["spec/tokens_per_second"] = sample.num_tokens / metrics["time/rollout"]
    metrics["compile/count"] = progress.compilations.count
    metrics["compile/seconds"] = progress.compilations.seconds
    metrics["compile/seconds_behind"] = progress.compilations.seconds_behind
    with progress.timed("records", f"step {step}: records"):
        records = completion_records(step, sample.examples, scored, sample.texts, parts.rewards.names, sample.extra)
        folder.append_completions(records)
        lengths.add(records)
        folder.append_metrics(metrics)
        trackers.step(step, metrics, records)
        progress.stepped(step, config.steps, metrics, metrics["compile/seconds"] - compiled)
    return state, metrics
