"""How many lessons a draft gets in a step: as many as they are worth."""

from abc import abstractmethod
from collections.abc import Mapping

import equinox as eqx

FIRST_STEPS = 10  # in which there is a lesson each, whatever it brings: nothing is known of that yet
_FIRST_SHARE = 0.05  # of a rollout's seconds, that lessons may take in the first steps where one takes less
_MOST_AT_FIRST = 4  # lessons of such a step: with a quarter of the completions each, all of them once
_MOST = 2  # lessons of a later step
_MOST_SAVED_UP = 4.0  # lessons: what was earned long ago is not spent on a draft that has learned since
_MOST_OWED = -4.0
_NEWEST = 0.3  # part of the newest lesson in the mean of their seconds
_MOVED = 0.02  # by so much less accepted than the last lesson found, the policy has moved away from the draft


class LessonState(eqx.Module):
    """What decides on lessons; a checkpoint keeps it.

    **Arguments:**

    - `step`: steps that were decided on.
    - `balance`: seconds that lessons may still take; negative where they have taken more than they were to.
    - `lesson_seconds`: a running mean, compiling left out; 0 before the first.
    - `waited`: steps without a lesson, in a row.
    - `patience`: steps without a lesson after which there is one all the same.
    - `found`: what the last lesson found accepted at the first draft position, and by how much that had changed.
    """

    step: int = 0
    balance: float = 0.0
    lesson_seconds: float = 0.0
    waited: int = 0
    patience: int = 1
    found: float = 0.0
    change: float = 0.0

    def numbers(self) -> dict[str, float | int]:
        """As a checkpoint keeps it."""
        return dict(vars(self))

    @staticmethod
    def of_numbers(numbers: Mapping[str, float | int]) -> "LessonState":
        """The inverse of `numbers`."""
        whole = {name: int(numbers[name]) for name in ("step", "waited", "patience")}
        return LessonState(**{**numbers, **whole})  # pyright: ignore[reportArgumentType]: as `numbers` has them


class AbstractLessonPlan(eqx.Module):
    """Says how many lessons there are in each step."""

    @abstractmethod
    def lessons(self, state: LessonState, rollout: float) -> int:
        """Of the step that comes next, whose rollouts took so many seconds, compiling left out."""

    @abstractmethod
    def update(
        self, state: LessonState, lessons: int, saved: float | None, spent: float, found: float | None
    ) -> LessonState:
        """After a step.

        **Arguments:**

        - `lessons`: how many there were.
        - `saved`: seconds that speculation saved in the rollouts of the step; `None` if that is not known.
        - `spent`: seconds that the lessons took, compiling left out.
        - `found`: what the first of them found accepted at the first draft position; `None` without one.
        """


class OneLesson(AbstractLessonPlan):
    """One in every step: the run does not depend on times, and can be repeated to the bit."""

    def lessons(self, state: LessonState, rollout: float) -> int:
        del state, rollout
        return 1

    def update(self, state, lessons, saved, spent, found):
        del lessons, saved, spent, found
        return state


class LessonBudget(AbstractLessonPlan):
    """Lessons take no more than a share of the seconds that speculation saves.

    In the first ten steps there is one lesson each, or as many as take a twentieth of the step's rollouts, up to four:
    with long completions a lesson is next to nothing, and a fresh draft has most to learn. From then on each step adds
    its share of what it saved to a balance, and lessons are paid from it. There are two in a step where the policy
    moves: the last lesson found less accepted than the one before. While nothing is earned there are lessons after 1,
    2, 4, 8, ... steps, so that a draft that would pay with a policy that has become easier is found out, at a price
    that the balance goes on owing.

    Times decide, so two runs with the same seed may differ in their drafts; what is generated has the same distribution
    all the same.

    **Arguments:**

    - `share`: of the seconds saved.
    """

    share: float = eqx.field(static=True, default=0.25)

    def lessons(self, state: LessonState, rollout: float) -> int:
        if state.lesson_seconds == 0.0:
            return 1
        if state.step < FIRST_STEPS:
            return min(max(int(_FIRST_SHARE * rollout / state.lesson_seconds), 1), _MOST_AT_FIRST)
        affordable = int(state.balance / state.lesson_seconds)
        if affordable >= 1:
            return min(affordable, _MOST if state.change < -_MOVED else 1)
        return 1 if state.waited >= state.patience else 0

    def update(self, state, lessons, saved, spent, found):
        seconds = state.lesson_seconds
        if lessons > 0:
            each = spent / lessons
            seconds = each if seconds == 0.0 else seconds + _NEWEST * (each - seconds)
        balance, patience = state.balance, state.patience
        if state.step >= FIRST_STEPS:
            unpaid = lessons > 0 and balance < seconds
            patience = 2 * patience if unpaid else 1 if lessons > 0 else patience
            balance += self.share * (saved or 0.0) - spent
            balance = min(max(balance, _MOST_OWED * seconds), _MOST_SAVED_UP * seconds)
        return LessonState(
            step=state.step + 1,
            balance=balance,
            lesson_seconds=seconds,
            waited=0 if lessons > 0 else state.waited + 1,
            patience=patience,
            found=state.found if found is None else found,
            change=0.0 if found is None or state.found == 0.0 else found - state.found,
        )


def lesson_plan(share: float | None, *, adaptive: bool) -> AbstractLessonPlan:
    """What a configuration asks for: where the draft length does not adapt to times, nor do lessons."""
    return OneLesson() if share is None or not adaptive else LessonBudget(share)
