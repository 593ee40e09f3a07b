"""A draft trained on the target's own generations, before (or without) any run."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from .._types import Rollouts
from ..config import (
    RunConfig,
    RunParts,
    check_draft_options,
    draft_spec,
    dtype_advice,
    load_policy,
    make_draft,
    make_parts,
    model_name,
    with_absolute_paths,
)
from ..decoding import DecodeProgress, FixedLength
from ..drafts import AbstractDraft, NoDraft, completion_tokens, coverage, draft_vocabulary, save_draft, tempered_part
from ..errors import Stopped, UserError
from ..files import user_path
from ..grpo import compute_copy
from ..models import AbstractLanguageModel
from ..records import RunProgress, replace_file, try_folder
from ..runtime import progress_console
from ._ending import is_donated
from ._interrupt import StopRequest, stop_requests, stopped_at_once
from ._lessons import (
    COMPARE,
    examine,
    learn_lesson,
    make_lesson,
    mean_entropy,
    recall_lesson,
    updates_per_lesson,
    with_scheduled_rate,
)
from ._out_of_memory import out_of_memory_advice
from ._roll_out import roll_out
from ._state import RunState
from ._step import next_examples, step_key

DEFAULT_STEPS, DEFAULT_MINUTES = 300, 10.0
_SECONDS_BETWEEN_SAVES = 60.0
_RECORD_EVERY = 10


class _BatchLeft(Exception):
    """A stop was asked for while a batch of rollouts was being decoded: it is of no use."""


def distill(
    config: RunConfig,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    console: Console | None = None,
) -> Path:
    """Trains a draft on completions that the target samples on a task, and saves it.

    The target is not trained. Batches of rollouts are decoded plainly. Each serves several updates, and is then
    replaced. The first batch is never learned from: the draft is examined on it before and after. The learning rate
    rises over ten updates, is constant until half of the time is over, then falls linearly to 0.

    **Arguments:**

    - `config`: as for a run. What matters of it: `model`, `task`, `draft`, `seed`, `out` (the folder to write) and, of
        `grpo`, how many prompts a batch has, completions a prompt, the longest completion, and the temperature.
    - `steps`: the most updates to make.
    - `minutes`: the most wall-clock time to learn. It counts from the first update on, which has compiled: there is
        always that one, and loading, compiling and the rollouts before it take none of the time. Without either, 300
        updates or 10 minutes, whichever comes first; only with `steps` alone does the same seed give the same draft.
    - `console`: where progress goes; by default standard output, and where that is closed or full, nowhere.

    **Returns:**

    The draft's folder: `draft.json`, `draft.safetensors`, and `distill.json`, which says how it was trained, how its
    expected acceptance by position was before and after, and how long its accepted chains are.

    **Raises:**

    `UserError` for errors that a user can correct. `Stopped` after SIGINT, SIGTERM or SIGHUP; what was learned is saved
    first.
    """
    if (steps is not None and steps < 1) or (minutes is not None and not 0 < minutes < math.inf):
        raise UserError(
            f"steps = {steps} and minutes = {minutes} leave no time to learn, or no end: give finite numbers above "
            "0, or neither"
        )
    if steps is None and minutes is None:
        steps, minutes = DEFAULT_STEPS, DEFAULT_MINUTES
    out = Path(config.out)
    _check(config, out)
    config = with_absolute_paths(config)  # what the draft's folder keeps is found again from anywhere
    check_draft_options(config.draft)
    console = console or progress_console()
    progress = RunProgress(console)
    with progress, stopped_at_once(), out_of_memory_advice():
        progress.phase(f"loading {model_name(config)}")
        policy, tokenizer = load_policy(config.model.path, config.model.adapter, config.model.revision)
        progress.advise(dtype_advice(config.model.dtype, policy.hidden_size))
        draft = make_draft(config.draft, policy, config.seed, tokenizer)
        if draft.train_length == 0:
            raise UserError(
                f"a draft of kind {config.draft.kind!r} has nothing to train, whatever the target: use it as it is, "
                f"with specgrpo run --draft {config.draft.kind}"
            )
        parts = make_parts(config, tokenizer, draft, with_rewards=False)
        state = RunState.frozen_policy(policy, draft, parts.draft_optimizer).laid_out(parts.mesh)
        del policy, draft
        _Session(parts, state, steps, minutes, out, progress).work()
    console.print(f"Draft: {out}", soft_wrap=True, markup=False, highlight=False)
    return out


def _check(config: RunConfig, out: Path) -> None:
    """Raises if there is no draft to train, or the folder holds something else than the draft to go on with."""
    if not config.draft.enabled:
        off = "draft.kind = 'none'" if config.draft.kind == "none" else "draft.mode = 'off'"
        raise UserError(f"{off} says that there is no draft to train: name one with --draft")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder: choose another with --out")
    goes_on = config.draft.path is not None and out.resolve() == user_path(config.draft.path).resolve()
    if not goes_on and out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"the folder {out} is not empty: choose another with --out, or go on with the draft in it by --draft {out}"
        )
    try_folder(out)


class _Session:
    """One distillation: its state, its clock and its record."""

    def __init__(
        self,
        parts: RunParts,
        state: RunState,
        steps: int | None,
        minutes: float | None,
        out: Path,
        progress: RunProgress,
    ):
        self.parts, self.state, self.out, self.progress = parts, state, out, progress
        self.steps = math.inf if steps is None else steps
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.begin, self.updates = time.perf_counter(), 0
        self.learning_since: float | None = None  # the end of the first update, which compiles
        self.record: dict[str, Any] = _provenance(parts.config) | {"learned_from_tokens": 0, "history": []}

    def work(self) -> None:
        """Learns until time is up or a signal asks for an end, then writes what was learned.

        **Raises:**

        `Stopped`, once that is done, if a signal has asked for it.
        """
        target = compute_copy(self.state.policy, self.parts.config.model.dtype, self.parts.mesh)

        def told(stop: StopRequest) -> None:
            self.progress.say(f"{stop.name}: finishing, then saving what was learned (once more to stop at once)")

        with stop_requests(told) as stop:

            def decoding(progress: DecodeProgress) -> None:
                self.progress.decoding(progress)
                if stop.asked:
                    raise _BatchLeft

            layers = self.state.draft.layers
            self.progress.phase("the rollouts that are kept to examine the draft with")
            try:
                held_out = make_lesson(self.parts, target, NoDraft(), layers, 0, decoding)
            except _BatchLeft:
                self._end_without_updates(stop)
            entropy = mean_entropy(self.parts, target, held_out)
            loss, before = self._examine(target, held_out)
            self.progress.say(f"before: draft loss {loss:.3f}  {_positions(before)}  entropy {entropy:.2f}")
            self.record["held_out"] = {
                "tokens": int(held_out.rollouts.lengths.sum()),
                "entropy": entropy,
                "loss_before": loss,
                "expected_acceptance_before": before,
            }
            updates = self._learn(target, layers, decoding, stop)
            if updates == 0:
                self._end_without_updates(stop)
            if stop.asked:  # a kill may follow, and examining takes a while
                self._save(updates, finished=False)
            loss, after = self._examine(target, held_out)
            self.progress.say(f"after:  draft loss {loss:.3f}  {_positions(after)}  on rollouts it did not learn from")
            self.record["held_out"] |= {"loss_after": loss, "expected_acceptance_after": after}
            self._tell_of_options(held_out)
            self._save(updates, finished=not stop.asked)
            if not stop.asked:
                try:
                    self._measure(target, decoding)
                except _BatchLeft:
                    pass
                self._save(updates, finished=True)
            if stop.number is not None:
                self.progress.say(f"Stopped by {stop.name} after {updates} updates; what was learned is in {self.out}")
                raise Stopped(stop.number, at_once=False)

    def _end_without_updates(self, stop: StopRequest) -> NoReturn:
        if stop.number is None:
            raise UserError("the draft has learned nothing, for there was no update: give more --minutes or --steps")
        self.progress.say(f"Stopped by {stop.name} before anything was learned; nothing is saved.")
        raise Stopped(stop.number, at_once=False)

    def _tell_of_options(self, held_out) -> None:
        """What the draft's vocabulary covers of rollouts that it was not chosen from, and its temperatures."""
        vocabulary, tempered = draft_vocabulary(self.state.draft), tempered_part(self.state.draft)
        if vocabulary.size:
            share = coverage(vocabulary, completion_tokens(held_out.rollouts))
            self.progress.say(f"its {vocabulary.size} tokens cover {share:.2%} of those rollouts")
            self.record["held_out"]["coverage"] = share
        if tempered is not None:
            temperatures = tempered.temperature.tolist()
            self.progress.say("temperature by position " + " ".join(f"{value:.2f}" for value in temperatures))
            self.record["temperature_by_position"] = temperatures

    def _learn(self, target: AbstractLanguageModel, layers: tuple[int, ...], decoding, stop: StopRequest) -> int:
        """Updates until there is no more time; how many there were. Whatever ends it, what was learned is saved."""
        try:
            self._update_until_done(target, layers, decoding, stop)
        except Stopped:
            raise  # a second signal: at once
        except BaseException:
            if self.updates and not is_donated(self.state.draft):
                self._keep()
            raise
        return self.updates

    def _keep(self) -> None:
        try:
            self._save(self.updates, finished=False)
        except UserError as error:  # a full disk: what ended the learning is told all the same
            self.progress.say(f"what {self.updates} updates have taught could not be saved: {error}")
        else:
            self.progress.say(f"what {self.updates} updates have taught is in {self.out}")

    def _update_until_done(
        self, target: AbstractLanguageModel, layers: tuple[int, ...], decoding, stop: StopRequest
    ) -> None:
        per_lesson = updates_per_lesson(self.parts)
        lesson, saved, update = None, time.perf_counter(), 0
        while update < self.steps and self._learning() < self.seconds and not stop.asked:
            number, within = divmod(update, per_lesson)
            if lesson is None or within == 0:
                self.progress.phase(f"batch {number + 1} of rollouts")
                try:
                    lesson = make_lesson(self.parts, target, NoDraft(), layers, 1 + number, decoding)
                except _BatchLeft:
                    break
                self.state = recall_lesson(self.state, lesson)
                self.record["learned_from_tokens"] += int(lesson.rollouts.lengths.sum())
            self.progress.phase(f"update {update + 1}")
            parts = with_scheduled_rate(self.parts, update, self._done(update))
            self.state, metrics = learn_lesson(parts, self.state, target, lesson, update)
            update += 1
            self.updates = update
            if self.learning_since is None:
                self.learning_since = time.perf_counter()
            self._tell(update, metrics)
            if time.perf_counter() - saved > _SECONDS_BETWEEN_SAVES:
                self.progress.phase("saving")
                self._save(update, finished=False)
                saved = time.perf_counter()

    def _examine(self, target: AbstractLanguageModel, held_out) -> tuple[float, list[float]]:
        self.progress.phase("examining the draft")
        return examine(self.parts, self.state.draft, target, held_out, self.state.draft_acceptance)

    def _measure(self, target: AbstractLanguageModel, decoding) -> None:
        """Decodes the prompts that were kept once more, with the draft: what is accepted in earnest."""
        config, grpo = self.parts.config, self.parts.config.grpo
        if config.draft.length == 0:
            return
        self.progress.phase("decoding with the draft")
        _, prompts = next_examples(
            self.parts.task, self.parts.tokenizer, target, 0, grpo.prompts_per_step, grpo.max_completion_length
        )
        draft: AbstractDraft = compute_copy(self.state.draft, config.model.dtype, self.parts.mesh)
        key = step_key(config.seed, -1, COMPARE)
        # An adaptive length would first look at plain decoding, and might draft nothing at all.
        parts = dataclasses.replace(self.parts, length=FixedLength(config.draft.length))
        rollouts: Rollouts = roll_out(parts, *parts.mesh.copies((target, draft)), prompts, key, decoding)
        found = rollouts.statistics
        rates = found.acceptance_rate_by_position[: config.draft.length]
        self.progress.say(
            f"decoding with {config.draft.length} guesses a round ({config.draft.verifier}): acceptance length "
            f"{found.acceptance_length:.2f}, by position " + " ".join(f"{rate:.2f}" for rate in rates)
        )
        self.record["decoding"] = {
            "length": config.draft.length,
            "verifier": config.draft.verifier,
            "tokens": int(rollouts.lengths.sum()),
            "acceptance_length": found.acceptance_length,
            "acceptance_rate_by_position": rates,
        }

    def _elapsed(self) -> float:
        return time.perf_counter() - self.begin

    def _learning(self) -> float:
        """Seconds since the first update."""
        return 0.0 if self.learning_since is None else time.perf_counter() - self.learning_since

    def _done(self, update: int) -> float:
        """The share of the work that is done, by updates or by time, whichever is further."""
        return min(1.0, max(update / self.steps, self._learning() / self.seconds))

    def _tell(self, update: int, metrics: dict[str, float]) -> None:
        is_last = update >= self.steps or self._learning() >= self.seconds
        if update % _RECORD_EVERY and update != 1 and not is_last:
            return
        seconds = self._elapsed()
        acceptance = [value for name, value in metrics.items() if name.startswith("draft/expected_acceptance_pos_")]
        total = "" if math.isinf(self.steps) else f"/{self.steps}"
        # The first update has compiled; those after it say how long the others will take.
        pace = self._learning() / max(update - 1, 1)
        time_left = self.seconds - self._learning()
        left = min((self.steps - update) * pace, time_left) if update > 1 else time_left
        left = "" if math.isinf(left) else f", about {max(left, 0):.0f} s left"
        self.progress.say(
            f"update {update}{total}  draft loss {metrics['draft/loss']:.3f}  {_positions(acceptance)}  "
            f"{seconds:.0f} s{left}"
        )
        self.record["history"].append(
            {
                "update": update,
                "seconds": seconds,
                "loss": metrics["draft/loss"],
                "expected_acceptance": acceptance,
            }
        )

    def _save(self, updates: int, *, finished: bool) -> None:
        config = self.parts.config
        save_draft(self.out, self.state.draft, self.state.policy, model_name(config), draft_spec(config.draft))
        self.record |= {"updates": updates, "seconds": self._elapsed(), "finished": finished}
        replace_file(self.out / "distill.json", (json.dumps(self.record, indent=1) + "\n").encode())


def _provenance(config: RunConfig) -> dict[str, Any]:
    grpo = config.grpo
    return {
        "model": model_name(config),
        "dtype": config.model.dtype,
        "task": {"name": config.task.name, **config.task.options},
        "started_from": config.draft.path,
        "seed": config.seed,
        "prompts_per_batch": grpo.prompts_per_step,
        "completions_per_prompt": grpo.num_generations,
        "max_completion_length": grpo.max_completion_length,
        "temperature": grpo.temperature,
        "draft": config.draft.model_dump(),
    }


def _positions(acceptance: list[float]) -> str:
    return "expected acceptance by position " + " ".join(f"{value:.2f}" for value in acceptance)
