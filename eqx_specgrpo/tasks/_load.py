"""From what a user writes in a configuration to tasks and rewards."""

import functools
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..choices import REWARDS, TASKS, Options, absolute_place, described, listed
from ..errors import UserError, did_you_mean
from ..files import import_callable
from ._base import AbstractTask
from ._kind import RewardKind, TaskKind
from ._reward_call import RewardFunction
from ._rewards import Rewards

# By what a configuration calls them; each is described at the end of its file.
TASK_KINDS: Mapping[str, TaskKind] = described(__package__ or "", TASKS, "TASK", TaskKind)
REWARD_KINDS: Mapping[str, RewardKind] = described(__package__ or "", REWARDS, "REWARD", RewardKind)


def load_task(name: str, seed: int, options: Mapping[str, Any]) -> AbstractTask:
    """Builds a task.

    **Arguments:**

    - `name`: one of the forms of `TASK_KINDS`: `"arithmetic"`, the path of a file, and so on.
    - `seed`: of the items and their order.
    - `options`: further arguments of the task's class.

    **Returns:**

    The task.

    **Raises:**

    `UserError` for an unknown name or option, or an option of the wrong type or out of range.
    """
    kind = _kind(name)
    return kind.task(*kind.arguments(name) or (), seed=seed, **kind.options(name).read(options))


def task_options(form: str) -> Options:
    """Returns the options of a kind of task, by its name in `TASK_KINDS`."""
    return TASK_KINDS[form].options(form)


def absolute_task(name: str) -> str:
    """The name of a task, found from any working directory: that of a file or folder as its absolute path."""
    return absolute_place(name) if any(kind.is_file and kind.arguments(name) for kind in TASK_KINDS.values()) else name


def absolute_task_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task, in which the names of other tasks are found from any working directory."""
    mixed = options.get("tasks")
    if not isinstance(mixed, list):
        return dict(options)
    return {**options, "tasks": [_absolute_entry(entry) for entry in mixed]}


def _absolute_entry(entry: Any) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        return entry  # whoever makes the mixture says what is wrong
    return {**entry, "name": absolute_task(entry["name"])}


def _kind(name: str) -> TaskKind:
    for kind in TASK_KINDS.values():
        if kind.arguments(name) is not None:
            return kind
    # What stands in capitals is the user's to say; the rest of it can be misspelt.
    words = [re.sub("[A-Z].*", "", form) for form in TASK_KINDS]
    suggestion = did_you_mean(name, filter(None, words))
    if suggestion.startswith(" Did"):
        suggestion += f" (There are {listed(TASKS, 'and')}.)"
    else:
        suggestion = f" The choices are: {listed(TASKS)}."
    raise UserError(f"there is no task {name!r}.{suggestion}")


def load_rewards(
    specs: Sequence[str | RewardFunction],
    weights: Sequence[float] | None,
    task: AbstractTask,
    timeout: float = math.inf,
) -> Rewards:
    """Finds reward functions.

    **Arguments:**

    - `specs`: for each function one of: a name that the task knows; `"arithmetic"`, `"running_totals"`,
        `"math"`, `"think_format"` or `"soft_overlong(L, C)"`; `"package.module:function"`; `"file.py:function"`; a
        function. If there are none, the task's own are taken.
    - `weights`: one per function; all 1 if `None`.
    - `task`: whose rewards they are.
    - `timeout`: seconds that each function may take for a call.

    **Returns:**

    The functions, with names and weights.

    **Raises:**

    `UserError` for what can't be found or isn't callable, and for a number of weights that doesn't fit.
    """
    own = dict(task.default_rewards())
    if not specs and not own:
        raise UserError(
            "the task has no reward of its own: give one as --reward, such as think_format, package.module:function or "
            "file.py:function (from Python, as rewards=)"
        )
    specs = list(specs) or list(own)
    for spec in specs:
        if specs.count(spec) > 1:
            raise UserError(f"the reward {spec!r} is given {specs.count(spec)} times: give it once, with a weight")
    found = [_find(spec, own) if isinstance(spec, str) else (_name_of(spec), spec) for spec in specs]
    short = [name for name, _ in found]
    names = [
        name if short.count(name) == 1 else spec if isinstance(spec, str) else f"{name} {number}"
        for number, (name, spec) in enumerate(zip(short, specs, strict=True), 1)
    ]
    if weights is None:
        weights = [1.0] * len(specs)
    if len(weights) != len(specs):
        raise UserError(
            f"{len(specs)} rewards ({', '.join(names)}) but {len(weights)} weights: give one weight a reward"
        )
    functions = tuple(function for _, function in found)
    return Rewards(tuple(names), functions, tuple(float(weight) for weight in weights), timeout)


def _find(spec: str, own: Mapping[str, RewardFunction]) -> tuple[str, RewardFunction]:
    if spec in own:
        return spec, own[spec]
    word = spec.partition("(")[0].strip()
    for form, kind in REWARD_KINDS.items():
        if kind.numbers and word == form.partition("(")[0]:
            return word, kind.function(*_numbers(spec, f"{word}({', '.join(kind.numbers)})", len(kind.numbers)))
        if spec == form:
            if kind.check is not None:
                kind.check()
            return spec, kind.function
    source, colon, function = spec.rpartition(":")
    if not colon:
        if spec.endswith(".py"):
            raise UserError(f"the reward {spec!r} must say which function of the file it is: {spec}:FUNCTION")
        hint = did_you_mean(spec, {*own, *REWARD_KINDS})
        raise UserError(f"there is no reward {spec!r}.{hint} (Or package.module:function, or file.py:function.)")
    return function, import_callable(spec, "reward", "function")


def _name_of(function: RewardFunction) -> str:
    """What to call a function in metrics and messages; of another object that can be called, its class."""
    if not callable(function):
        raise UserError(f"a reward is {function!r}, which can't be called: give a function, or a name as text")
    if isinstance(function, functools.partial):
        return _name_of(function.func)
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def _numbers(spec: str, form: str, count: int) -> list[int]:
    found = re.fullmatch(r"\w+\(\s*([0-9]+(?:\s*,\s*[0-9]+)*)\s*\)", spec)
    numbers = [int(number) for number in found.group(1).split(",")] if found else []
    if len(numbers) != count:
        raise UserError(f"the reward {spec!r} must say its numbers: {form}")
    return numbers
