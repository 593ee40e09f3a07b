"""The draft's part of a step: what it remembers, its lessons, and that they have changed it."""

import dataclasses
import time

import equinox as eqx
import jax
import jax.random as jr

from ..config import RunParts
from ..drafts import remember
from ..records import RunProgress
from ._draft_guard import DraftGuard
from ._draft_step import draft_rows, found_acceptance, update_draft
from ._lesson_budget import lesson_plan
from ._lessons import CHOOSE
from ._sample import StepSample, learn_left_out
from ._state import PolicyUpdate, RunState
from ._step import step_key


def teach_draft(
    parts: RunParts,
    state: RunState,
    sample: StepSample,
    update: PolicyUpdate,
    done: int,
    guard: DraftGuard,
    saved: float | None,
    rollout: float,
    progress: RunProgress,
) -> tuple[RunState, dict[str, float | int]]:
    """As many lessons as they are worth, and the step's metrics of them. DONATES the draft and its optimizer's state.

    **Arguments:**

    - `sample`, `update`: of the step.
    - `done`: steps that came before.
    - `guard`: is told of the draft, whether it learns or not.
    - `saved`: seconds that speculation saved in the step's rollouts, if that is known.
    - `rollout`: seconds that these took, compiling left out.
    """
    config, step, rollouts = parts.config, done + 1, sample.scored.rollouts
    if not config.draft.enabled:
        return state, {}
    before, lessons, metrics = state.draft, 0, {}
    # Clocks of processes differ, and all of them have to give the draft the same lessons.
    plan = lesson_plan(config.draft.lesson_share, adaptive=config.draft.adaptive and parts.processes.count == 1)
    if config.draft.learns:
        for decoded, _ in sample.decoded:
            state = dataclasses.replace(state, draft=remember(state.draft, decoded))
    if config.draft.learns and state.draft.train_length > 0:
        planned, began = plan.lessons(state.lessons, rollout), time.perf_counter()
        compiled = progress.compilations.seconds
        with progress.timed("draft", f"step {step}: draft update"):
            for number in range(planned):
                key = step_key(config.seed, done, CHOOSE)
                key = key if number == 0 else jr.fold_in(key, -number & 0xFFFFFFFF)
                rows = draft_rows(key, len(rollouts.group), config.draft.fraction)
                state, found = update_draft(
                    parts, state, update.weights, update.features, update.batch, rollouts.lengths, rows, step
                )
                metrics = metrics or found  # of the first: what it found, no lesson of this step has changed
                lessons += 1
            if planned > 0:
                state, left_out = learn_left_out(parts, state, update.weights, sample.decoded, done)
                lessons += left_out
            jax.block_until_ready(eqx.filter(state.draft, eqx.is_array))
        spent = max(0.0, time.perf_counter() - began - (progress.compilations.seconds - compiled))
        found_first = next(iter(found_acceptance(metrics)), None)
        state = dataclasses.replace(state, lessons=plan.update(state.lessons, lessons, saved, spent, found_first))
        metrics |= {"draft/lessons": lessons, "draft/seconds_spent": spent}
    can_change = config.draft.learning_rate > 0 and metrics.get("draft/grad_norm", 0.0) > 0
    remembers = lessons == 0 and state.draft is not before
    metrics |= guard.end(state.draft, step, lessons, can_change=can_change, remembers=remembers)
    return state, metrics
