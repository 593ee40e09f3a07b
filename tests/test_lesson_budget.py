"""How many lessons a draft gets, and what plain decoding would have taken."""

import dataclasses

import numpy as np
import pytest

from eqx_specgrpo.config import load_config
from eqx_specgrpo.decoding import plain_seconds
from eqx_specgrpo.train._lesson_budget import FIRST_STEPS, LessonBudget, LessonState, OneLesson, lesson_plan
from eqx_specgrpo.train._lessons import updates_per_warm_up_lesson


def run(saved, steps=100, each=2.0, found=lambda step: 0.7, plan=None, rollout=30.0):
    """Lessons of each step.

    **Arguments:**

    - `saved`: seconds saved in a step, a function of its number.
    - `each`: seconds of a lesson.
    - `rollout`: seconds of each step's rollouts.
    """
    plan, state, lessons = LessonBudget() if plan is None else plan, LessonState(), []
    for step in range(steps):
        lessons.append(plan.lessons(state, rollout))
        state = plan.update(state, lessons[-1], saved(step), each * lessons[-1], found(step) if lessons[-1] else None)
    return lessons, state


@pytest.mark.parametrize("saved", [1.0, 4.0, 9.0, 30.0])
def test_lessons_take_no_more_than_a_quarter_of_what_they_bring(saved):
    lessons, _ = run(lambda step: saved)
    later = lessons[FIRST_STEPS:]
    assert lessons[:FIRST_STEPS] == [1] * FIRST_STEPS
    # The first of them were unpaid: one each after 1, 2 and 4 steps at most.
    assert 2.0 * sum(later) <= 0.25 * saved * len(later) + 2.0
    if saved >= 9.0:
        assert later[1:] == [1] * (len(later) - 1), "one is enough where the policy does not move"


@pytest.mark.parametrize("rollout, lessons", [(30.0, 1), (100.0, 2), (130.0, 3), (1000.0, 4)])
def test_where_rollouts_are_long_the_first_steps_have_more(rollout, lessons):
    """A twentieth of the rollout's seconds, once it is known what a lesson takes."""
    found, _ = run(lambda step: 9.0, rollout=rollout)
    assert found[:FIRST_STEPS] == [1] + [lessons] * (FIRST_STEPS - 1) and max(found[FIRST_STEPS:]) == 1
    assert run(lambda step: 9.0, rollout=rollout, plan=OneLesson())[0] == [1] * 100


def test_without_savings_lessons_become_ever_rarer():
    lessons, state = run(lambda step: 0.0, steps=200)
    assert 3 <= sum(lessons[FIRST_STEPS:]) <= 8 and state.balance < 0
    assert run(lambda step: -3.0, steps=200)[0] == lessons, "a loss owes nothing beyond the lessons"


def test_savings_that_begin_later_are_made_use_of():
    lessons, _ = run(lambda step: 0.0 if step < 60 else 20.0, steps=100)
    assert sum(lessons[64:]) == 36


def test_there_are_more_while_the_policy_moves():
    lessons, _ = run(lambda step: 40.0, found=lambda step: 0.7 if step < 50 else max(0.1, 0.7 - 0.03 * (step - 49)))
    assert set(lessons[12:50]) == {1} and set(lessons[53:65]) == {2} and set(lessons[75:]) == {1}


def test_what_is_not_known_saves_nothing():
    assert run(lambda step: None)[0] == run(lambda step: 0.0)[0]


def test_the_state_goes_through_a_checkpoint():
    _, state = run(lambda step: 5.0, steps=23)
    assert LessonState.of_numbers(state.numbers()) == state and isinstance(state.numbers()["step"], int)
    assert set(state.numbers()) == {field.name for field in dataclasses.fields(state)}


def test_where_nothing_depends_on_times_there_is_one_in_every_step():
    assert isinstance(lesson_plan(0.25, adaptive=False), OneLesson)
    assert isinstance(lesson_plan(None, adaptive=True), OneLesson)
    assert lesson_plan(0.5, adaptive=True) == LessonBudget(0.5)
    lessons, state = run(lambda step: 0.0, plan=OneLesson())
    assert lessons == [1] * 100 and state == LessonState()


@pytest.mark.parametrize("warmup, fraction, updates", [(20, 0.25, 20), (30, 0.25, 15), (100, 0.25, 17), (3, 1.0, 3)])
def test_a_warm_up_makes_no_rollouts_for_a_few_updates(warmup, fraction, updates):
    config = load_config(None, [f"draft.warmup={warmup}", f"draft.fraction={fraction}"])
    assert updates_per_warm_up_lesson(config.draft) == updates


def seconds(rows, context=0.0):
    return {1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0, 16: 5.0}[rows]


def test_plain_rounds_follow_from_the_lengths():
    """Rows of 3, 5, 5 and 9 tokens: 2 rounds with all four, 2 with three in a batch of four, 4 with the last."""
    lengths = np.array([5, 3, 9, 5])
    assert plain_seconds(lengths, 1, seconds) == 4 * 2.0 + 4 * 1.0
    assert plain_seconds(lengths, 2, seconds) == 4 * 2.0 + 4 * 1.5
    assert plain_seconds(np.array([7]), 1, seconds) == 6.0
    assert plain_seconds(np.array([1, 1]), 1, seconds) == 0.0


def test_plain_rounds_where_rows_wait():
    """Two at a time: 5 and 3, then 9 from round 2 on, then 5 from round 4 on, which end in round 10 and 8."""
    assert plain_seconds(np.array([5, 3, 9, 5]), 1, seconds, max_rows=2) == 8 * 1.5 + 2 * 1.0
    assert plain_seconds(np.array([5, 3, 9, 5]), 1, seconds, max_rows=9) == 12.0


def test_plain_rounds_are_asked_for_with_the_context_of_the_longest_row():
    """In the middle of each stretch; a row that waited begins anew."""
    asked = []

    def seen(rows, context):
        asked.append((rows, context))
        return 1.0

    plain_seconds(np.array([5, 3, 9]), 1, seen)
    assert asked == [(3, 2.0), (2, 4.0), (1, 7.0)]
    asked.clear()
    plain_seconds(np.array([5, 3, 9]), 1, seen, max_rows=2)
    assert asked == [(2, 2.0), (2, 4.0), (1, 6.0)]
