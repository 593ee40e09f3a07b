"""Drafts for a benchmark: several kinds distilled on the same generations of the target, each within a time limit."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ..config import RunParts
from ..decoding import DecodeProgress
from ..drafts import AbstractDraft, AbstractHistoryDraft, FallbackDraft, NoDraft
from ..models import AbstractLanguageModel, Features
from ..train import Lesson, RunState, examine, learn_lesson, make_lesson, recall_lesson, with_scheduled_rate

_FEWEST = 2  # one to learn from, one to be examined on
_RECORDED = 20  # points of a learning curve


class Generations(eqx.Module):
    """The target's own completions, with the features that any of several drafts needs.

    **Arguments:**

    - `lessons`: batches; the first is kept to examine drafts on.
    - `layers`: whose features they hold.
    - `seconds`: that it took to make them, compilation included.
    """

    lessons: tuple[Lesson, ...]
    layers: tuple[int, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Of completions to learn from."""
        return sum(int(lesson.rollouts.lengths.sum()) for lesson in self.lessons[1:])

    def lesson(self, number: int, layers: tuple[int, ...]) -> Lesson:
        """A batch with the features of some of the layers."""
        lesson = self.lessons[number]
        features = lesson.features.features
        chosen = Features(features.last, tuple(features.layers[self.layers.index(layer)] for layer in layers))
        return dataclasses.replace(lesson, features=dataclasses.replace(lesson.features, features=chosen))


def collect_generations(
    parts: RunParts,
    target: AbstractLanguageModel,
    layers: tuple[int, ...],
    *,
    seconds: float,
    batches: int | None = None,
    on_phase: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[DecodeProgress], None] | None = None,
) -> Generations:
    """Batches of completions of the task's prompts, sampled plainly, and the target's features of them.

    **Arguments:**

    - `parts`: says how many prompts a batch has, completions a prompt, their longest length, temperature and seed.
    - `target`: in the dtype to compute in.
    - `layers`: of all the drafts that are to learn from them.
    - `seconds`: no batch is begun after so long, but there are two at least.
    - `batches`: exactly so many instead, whatever the time; the same seed and number give the same batches.
    """
    begin, lessons = time.perf_counter(), []
    layers = tuple(sorted(set(layers)))
    while len(lessons) < _FEWEST or (
        time.perf_counter() - begin < seconds if batches is None else len(lessons) < batches
    ):
        on_phase(f"batch {len(lessons) + 1} of the target's own completions")
        lessons.append(make_lesson(parts, target, NoDraft(), layers, len(lessons), on_progress))
    return Generations(tuple(lessons), layers, time.perf_counter() - begin)


def distil_on(
    parts: RunParts,
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    generations: Generations,
    *,
    seconds: float,
    on_phase: Callable[[str], None] = lambda text: None,
) -> tuple[AbstractDraft, dict[str, Any]]:
    """A draft trained on batches in turn until time is up, at the rate of `with_scheduled_rate`.

    DONATES the draft.

    **Arguments:**

    - `parts`: made for this draft.
    - `target`: in the dtype to compute in; its weights gave the features.
    - `generations`: with the features of the draft's layers.
    - `seconds`: for learning, compilation included; there is one update at least.

    **Returns:**

    The draft in float32, and a JSON-able record of how it came about.
    """
    begin = time.perf_counter()
    state = RunState.frozen_policy(target, draft, parts.draft_optimizer)
    layers, count = draft.layers, len(generations.lessons)
    for number in range(1, count):
        state = recall_lesson(state, generations.lessons[number])
    held_out = generations.lesson(0, layers)
    loss_before, before = examine(parts, state.draft, target, held_out, state.draft_acceptance)
    curve, update, elapsed = [], 0, 0.0
    while update == 0 or elapsed < seconds:
        on_phase(f"{parts.config.draft.kind} learns: update {update + 1}, {max(0.0, seconds - elapsed):.0f} s left")
        lesson = generations.lesson(1 + update % (count - 1), layers)
        at_its_rate = with_scheduled_rate(parts, update, elapsed / seconds)
        state, metrics = learn_lesson(at_its_rate, state, target, lesson, update)
        update, elapsed = update + 1, time.perf_counter() - begin
        if update == 1 or elapsed >= seconds or elapsed - curve[-1]["seconds"] > seconds / _RECORDED:
            curve.append({"update": update, "seconds": elapsed, "loss": metrics["draft/loss"]})
    on_phase(f"{parts.config.draft.kind} is examined")
    loss_after, after = examine(parts, state.draft, target, held_out, state.draft_acceptance)
    return state.draft, {
        "distilled": True,
        "updates": update,
        "seconds": elapsed,
        "generating_seconds": generations.seconds,
        "batches": count,
        "learned_from_tokens": generations.tokens,
        "learning_rate": parts.config.draft.learning_rate,
        "loss_name": parts.config.draft.loss,
        "held_out_tokens": int(held_out.rollouts.lengths.sum()),
        "loss_before": loss_before,
        "loss_after": loss_after,
        "expected_acceptance_before": before,
        "expected_acceptance_after": after,
        "curve": curve,
    }


def expected_acceptance(
    parts: RunParts, draft: AbstractDraft, target: AbstractLanguageModel, lesson: Lesson
) -> list[float] | None:
    """Teacher-forced, by draft position: `sum min(target, draft)` on the lesson's completions. `None` for what looks
    up: there is no distribution of its own to compare.

    **Arguments:**

    - `lesson`: with the features of the draft's layers.
    """
    if draft.train_length == 0 or isinstance(draft, AbstractHistoryDraft | FallbackDraft):
        return None
    return examine(parts, draft, target, lesson, jnp.zeros(draft.train_length))[1]
