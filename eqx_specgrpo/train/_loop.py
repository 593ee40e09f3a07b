"""A whole run: from a configuration to a trained policy, its draft, and a folder that tells the story."""

import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import equinox as eqx
import jax
import numpy as np
from rich.console import Console

from .._compile import count_compilations
from .._errors import UserError
from ..drafts import NoDraft, save_draft
from ..grpo import compute_copy, make_update_batch
from ..models import locate, save_model
from ._check import load_task_and_rewards
from ._checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ._compare import compare_with_plain
from ._config import RunConfig
from ._load_config import check_resume, dump_config, load_config
from ._parts import RunParts, default_model_path, learning_rate, load_policy, make_draft, make_parts
from ._progress import RunProgress
from ._report import summary_table
from ._run_folder import RunFolder, read_records
from ._state import RunState
from ._step import (
    completion_records,
    draft_rows,
    features_of,
    next_examples,
    roll_out,
    rollout_metrics,
    score,
    step_key,
    update_draft,
    update_policy,
)

# What a step's random numbers are for.
_DECODE, _CHOOSE, _COMPARE = 0, 1, 2
_WARMUP_UPDATES_PER_ROLLOUT = 10


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
    progress = RunProgress(console)
    load_task_and_rewards(config)
    with RunFolder(Path(config.out), resume) as folder, progress:
        if resume:
            check_resume(load_config(folder.config_path), config)
        with count_compilations(progress.note) as compilations:
            progress.phase(f"loading {config.model.path or 'the embedded default model'}")
            policy, tokenizer = load_policy(config.model.path)
            draft = make_draft(config.draft, policy, config.seed)
            parts = make_parts(config, tokenizer, draft)
            # Frozen, in the dtype of computation; only held where the loss asks for it.
            reference = compute_copy(policy, config.model.dtype) if config.grpo.beta != 0 else None
            state = RunState.fresh(policy, draft, parts.policy_optimizer, parts.draft_optimizer)
            start, state = _start_or_resume(folder, resume, state, config)
            folder.write_config(dump_config(config))
            del policy, draft

            if start == 0 and config.draft.warms_up:
                state = _warm_up(parts, state, progress)
            with _interrupts(progress) as interrupted:
                for step in range(start, config.steps):
                    try:
                        state = _one_step(parts, state, reference, step, folder, progress, compilations)
                    except UserError:
                        if step > start:
                            _save_finished(state, step, folder, progress)
                        raise
                    done = step + 1
                    if interrupted() or done == config.steps or done % config.save_steps == 0:
                        progress.phase("writing the checkpoint")
                        save_checkpoint(folder.path, done, state.trees(), {})
                    if interrupted() and done < config.steps:
                        progress.close()
                        console.print(
                            f"Stopped after step {done} of {config.steps}; nothing is lost. Go on with: "
                            f"specgrpo run --resume --out {shlex.quote(config.out)}",
                            soft_wrap=True,  # to be copied: a line break or markup would spoil it
                            markup=False,
                            highlight=False,
                        )
                        return folder.path
            _finish(parts, state, folder, progress, console)
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


def _save_finished(state: RunState, step: int, folder: RunFolder, progress: RunProgress) -> None:
    """Before an error in a step ends the run: a checkpoint of the steps before it, unless its updates had begun."""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array))):
        return
    with suppress(UserError):  # A full disk, perhaps, and that may be what the run stops for.
        saved = save_checkpoint(folder.path, step, state.trees(), {})
        progress.note(f"the steps before are in {saved}; once the cause is mended, go on with --resume")


def _warm_up(parts: RunParts, state: RunState, progress: RunProgress) -> RunState:
    """Trains the draft on the policy's first, plainly decoded rollouts, before step 0."""
    config = parts.config
    target = compute_copy(state.policy, config.model.dtype)
    features, batch, rollouts = None, None, None
    for update in range(config.draft.warmup):
        source, within = divmod(update, _WARMUP_UPDATES_PER_ROLLOUT)
        if within == 0:
            progress.phase(f"warming up the draft: batch {source + 1} of rollouts")
            _, prompts = next_examples(
                parts.task,
                parts.tokenizer,
                target,
                source * config.grpo.prompts_per_step,
                config.grpo.prompts_per_step,
                config.grpo.max_completion_length,
            )
            key = step_key(config.seed, -1 - source, _DECODE)
            rollouts = roll_out(parts, target, NoDraft(), prompts, key, progress.decoding)
            batch = make_update_batch(rollouts, np.zeros(len(rollouts.group), np.float32))
            features = features_of(target, batch, state.draft.layers)
        assert features is not None and batch is not None and rollouts is not None
        progress.phase(f"warming up the draft: update {update + 1} of {config.draft.warmup}")
        rows = draft_rows(
            step_key(config.seed, -1 - update, _CHOOSE), len(rollouts.group), max(config.draft.fraction, 0.5)
        )
        state, metrics = update_draft(parts, state, target, features, batch, rollouts.lengths, rows, step=0)
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
    rollouts = roll_out(parts, target, draft, prompts, step_key(config.seed, step, _DECODE), progress.decoding)
    del target, draft
    clock.lap("rollout")

    progress.phase(f"step {step + 1}: rewards")
    scored, texts = score(parts.rewards, parts.tokenizer, examples, rollouts, grpo.scale_rewards, step)
    metrics = {"step": step} | rollout_metrics(scored, parts.rewards.names)
    clock.lap("reward")

    progress.phase(f"step {step + 1}: policy update")
    policy, optimizer_state, weights, features, batch, policy_metrics = update_policy(
        parts, state.policy, state.policy_optimizer, reference, scored, learning_rate(config, step), step
    )
    state = RunState(policy, optimizer_state, state.draft, state.draft_optimizer, state.draft_acceptance)
    metrics |= policy_metrics
    jax.block_until_ready(eqx.filter(state.policy, eqx.is_array))
    clock.lap("update")

    if config.draft.learns:
        progress.phase(f"step {step + 1}: draft update")
        rows = draft_rows(step_key(config.seed, step, _CHOOSE), len(rollouts.group), config.draft.fraction)
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


def _finish(parts: RunParts, state: RunState, folder: RunFolder, progress: RunProgress, console: Console) -> None:
    """Writes policy and draft for others to load, measures what speculation gave, and sums up."""
    config = parts.config
    progress.phase("saving policy/ and draft/")
    source = locate(config.model.path) if config.model.path else default_model_path()
    save_model(state.policy, folder.policy_path, parts.tokenizer, source if source.is_dir() else None)  # pyright: ignore[reportArgumentType]
    speedup = None
    if config.draft.enabled:
        save_draft(folder.draft_path, state.draft, state.policy, config.model.path or "the embedded default model")
        progress.say("policy/ and draft/ are saved; what follows only measures, and may be stopped")
        speedup = compare_with_plain(
            parts,
            compute_copy(state.policy, config.model.dtype),
            compute_copy(state.draft, config.model.dtype),
            config.steps * config.grpo.prompts_per_step,
            step_key(config.seed, config.steps, _COMPARE),
            progress,
        )
    progress.close()
    console.print(summary_table(read_records(folder.metrics_path), speedup))
    if speedup is not None and max(speedup.values()) < 1:
        progress.say(
            "Speculation did not pay here. Try a shorter draft (draft.length), more draft.warmup or draft.kind=hydra; "
            "draft.mode=off decodes plainly."
        )
    console.print(f"Run folder: {folder.path}", soft_wrap=True, markup=False, highlight=False)


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


@contextmanager
def _interrupts(progress: RunProgress) -> Iterator:
    """Turns the first Ctrl-C into a request to stop after the step; the second one stops at once."""
    asked = False

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        del frame
        if asked:
            raise KeyboardInterrupt
        asked = True
        progress.say("Ctrl-C: finishing this step, then writing a checkpoint (press again to stop at once)")

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread, where signals can't be taken: the caller's business then
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
