"""When a run measures its policy on items that it never learns from, and what it keeps of that."""

import math
from abc import ABC, abstractmethod
from pathlib import Path

from ..config import RunParts
from ..errors import UserError
from ..evaluation import Evaluation, EvaluationResult, evaluate, evaluation_line, make_evaluation
from ..models import AbstractLanguageModel
from ..records import EvaluationRecords, RunProgress
from ..tasks import AbstractTask, Rewards, TrainerState
from ._ending import unless_urgent
from ._interrupt import StopRequest
from ._policy import save_policy
from ._roll_out import copies_to_decode
from ._segments import SegmentLog
from ._state import RunState


class AbstractEvaluator(ABC):
    """Measures the policy after some of the steps."""

    @abstractmethod
    def header(self) -> list[str]:
        """Lines on what will be measured."""

    @abstractmethod
    def after(self, done: int, state: RunState, segments: SegmentLog, stop: StopRequest) -> dict[str, float]:
        """Measures after so many steps, if that is due and was not done before.

        The run goes on as if nothing had been measured.

        **Arguments:**

        - `segments`: whose knowledge of lengths is made use of.
        - `stop`: who asks for an end.

        **Returns:**

        The metrics, each with `eval/` in front; nothing if it was not due.
        """


class NoEvaluator(AbstractEvaluator):
    """Measures nothing."""

    def header(self) -> list[str]:
        return []

    def after(self, done: int, state: RunState, segments: SegmentLog, stop: StopRequest) -> dict[str, float]:
        del done, state, segments, stop
        return {}


class HeldOutEvaluator(AbstractEvaluator):
    """Measures on held-out items, every so many steps and at the end.

    **Arguments:**

    - `parts`: of the run.
    - `evaluation`: what is measured.
    - `folder`: of the run.
    - `progress`: told what goes on.
    """

    def __init__(self, parts: RunParts, evaluation: Evaluation, folder: Path, progress: RunProgress):
        self._parts, self._evaluation, self._progress = parts, evaluation, progress
        self._records = EvaluationRecords(folder)

    def header(self) -> list[str]:
        evaluation, every = self._evaluation, self._parts.config.eval.every
        often = "step" if every == 1 else f"{every} steps"
        return [
            f"measured  {len(evaluation.examples)} held-out prompts x {evaluation.samples} completions, every {often} "
            "and at the end"
        ]

    def after(self, done: int, state: RunState, segments: SegmentLog, stop: StopRequest) -> dict[str, float]:
        if not self._is_due(done) or any(record["step"] == done for record in self._records.read()):
            return {}
        with self._progress.timed("evaluation", f"evaluation after step {done}"):
            result = self._measured(done, state, segments, stop)
            self._keep_best(done, state, result)
            if self._parts.processes.is_first:
                self._records.append({"step": done} | result.metrics, result.completions)
        steps = self._parts.config.steps
        self._progress.say(f"evaluation after step {done}/{steps}  {evaluation_line(result.metrics)}")
        return result.metrics

    def _is_due(self, done: int) -> bool:
        config = self._parts.config
        if done == 0:
            return config.eval.at_start
        return done == config.steps or done % config.eval.every == 0

    def _measured(self, done: int, state: RunState, segments: SegmentLog, stop: StopRequest) -> EvaluationResult:
        parts, size = self._parts, self._parts.task.size
        epoch = None if size is None else state.position / size
        target, draft = copies_to_decode(parts, state.policy, state.draft)
        return evaluate(
            self._evaluation,
            target,
            draft,
            TrainerState(global_step=done, max_steps=parts.config.steps, epoch=epoch),
            unless_urgent(stop, self._progress.decoding, parts.processes),
            segments.length_state,
            parts.processes,
        )

    def _keep_best(self, done: int, state: RunState, result: EvaluationResult) -> None:
        """Writes the policy into `best/` if it is better than any before."""
        metric = self._parts.config.save_best
        if metric is None:
            return
        if metric not in result.metrics:
            raise UserError(
                f"save_best = {metric!r}, but the evaluation has no such metric: eval/maj@ needs a reward function "
                'that tells what completions answer, by log_extra("extracted_answer", ...), and eval/rewards/NAME/mean '
                "one of that name"
            )
        value, best = result.metrics[metric], self._records.best()
        if math.isnan(value) or (best is not None and best["value"] >= value):
            return
        is_first = self._parts.processes.is_first
        policy = self._parts.mesh.readable(state.policy, keep=is_first)
        if is_first:
            save_policy(self._parts, policy, self._records.best_path)
            self._records.write_best(done, metric, value)


def make_evaluator(
    parts: RunParts,
    held_out: tuple[AbstractTask, Rewards] | None,
    policy: AbstractLanguageModel,
    folder: Path,
    progress: RunProgress,
) -> AbstractEvaluator:
    """The evaluator of a run, with what it is to measure on, if anything."""
    if held_out is None:
        return NoEvaluator()
    evaluation = make_evaluation(parts.config, held_out, parts.tokenizer, policy, parts.verifier, parts.length)
    return HeldOutEvaluator(parts, evaluation, folder, progress)
