"""Several tasks in one stream, each with its share."""

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ._base import AbstractTask, Example
from ._kind import TaskKind, named

# Shares are exact in each stretch of so many items.
_STRETCH = 1000
_COLUMN = "task"


class MixtureTask(AbstractTask):
    """Items of several tasks in one endless stream. The column `task` says of which an item is, and a column that an
    item's task does not have is `None` there.

    Each task goes through its own items as it would alone: in an order of its own, all of them before any comes again.
    Within a thousand items each has its share of them, in an order that the seed shuffles anew. So where an item comes
    from is a function of the seed and its position alone, and a run resumes exactly.
    """

    seed: int
    size: int | None
    names: tuple[str, ...]
    tasks: tuple[AbstractTask, ...]
    counts: tuple[int, ...]
    columns: tuple[str, ...]

    def __init__(self, names: Sequence[str], tasks: Sequence[AbstractTask], weights: Sequence[float], seed: int = 0):
        """**Arguments:**

        - `names`: what the column `task` says, all different.
        - `tasks`: one a name.
        - `weights`: how often an item is of each, relative to one another; above 0.
        - `seed`: of the order in which the tasks take turns.
        """
        self.seed = seed
        self.size = None
        self.names = tuple(names)
        self.tasks = tuple(tasks)
        self.counts = shares(weights, _STRETCH)
        self.columns = tuple(dict.fromkeys(name for task in tasks for name in task.at(0).columns))

    def example(self, index: int) -> Example:
        if index < 0:
            raise IndexError(f"item {index} was asked for, but items count from 0")
        stretch, within = divmod(index, _STRETCH)
        turns = self._turns(stretch)
        chosen = turns[within]
        before = stretch * self.counts[chosen] + turns[:within].count(chosen)
        found = self.tasks[chosen].at(before)
        if _COLUMN in found.columns:
            raise UserError(
                f"the task {self.names[chosen]} has a column {_COLUMN!r}, in which a mixture says of which task an "
                "item is: rename it with `columns`"
            )
        return Example(found.prompt, dict.fromkeys(self.columns) | found.columns | {_COLUMN: self.names[chosen]})

    def default_rewards(self) -> Mapping[str, Callable[..., Any]]:
        """Those of the tasks. Each applies to the items of its own task alone; those of one name are one reward."""
        of_tasks: dict[str, dict[str, Callable[..., Any]]] = {}
        for name, task in zip(self.names, self.tasks, strict=True):
            for reward, function in task.default_rewards().items():
                of_tasks.setdefault(reward, {})[name] = function
        return {reward: _by_task(functions) for reward, functions in of_tasks.items()}

    def fingerprint(self) -> str:
        return "-".join(task.fingerprint() for task in self.tasks)

    def _turns(self, stretch: int) -> list[int]:
        """Which task each item of a stretch is of."""
        turns = [task for task, count in enumerate(self.counts) for _ in range(count)]
        # Of Python's generator only `random()` on a text seed is promised to stay the same from version to version.
        uniform = random.Random(f"mixture/{self.seed}/{stretch}").random
        return [task for _, task in sorted((uniform(), task) for task in turns)]


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers, at least 1, that add up to `total` and are as near to the weights' shares as can be."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        may = [i for i, count in enumerate(counts) if count + step >= 1]
        nearest = max(may, key=lambda i: step * (exact[i] - counts[i]))
        counts[nearest] += step
    return tuple(counts)


def mixture_task(seed: int = 0, *, tasks: list[dict[str, Any]]) -> MixtureTask:
    """A mixture of tasks that are named as in `[task]`.

    **Arguments:**

    - `seed`: of the order, and of the tasks.
    - `tasks`: one table a task, with its `name`, its `weight` (1 if it is not there) and its options.
    """
    from ._load import load_task  # which knows of this file

    if not tasks:
        raise UserError('task.tasks is empty: give one table a task, such as {name = "arithmetic", weight = 2.0}')
    names, made, weights = [], [], []
    for number, entry in enumerate(tasks):
        options = dict(entry)
        name, weight = options.pop("name", None), options.pop("weight", 1.0)
        where = f"task.tasks[{number}]"
        if not isinstance(name, str) or not name or name == "mixture":
            raise UserError(f"{where} is {entry}: give it a name, that of a task, and then its weight and options")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1e-3 <= weight <= 1e3:
            raise UserError(f"{where} has a weight of {weight!r}: it must be a number from 0.001 to 1000")
        try:
            made.append(load_task(name, seed, options))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        names.append(name)
        weights.append(float(weight))
    if len(names) > _STRETCH // 2:
        raise UserError(f"task.tasks has {len(names)} tasks: at most {_STRETCH // 2} can be mixed")
    distinct = [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names)]
    return MixtureTask(distinct, made, weights, seed)


def _by_task(functions: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A reward that asks the function of each row's own task, and applies to no others."""
    accepted = {name: _accepted(function) for name, function in functions.items()}

    def scored(completions: Sequence[Any], task: Sequence[Any], **others: Any) -> list[float | None]:
        rewards: list[float | None] = [None] * len(completions)
        for name, function in functions.items():
            if name not in task:
                continue
            given = {"completions": completions, **others}
            values = function(**{key: value for key, value in given.items() if accepted[name](key)})
            for row, of in enumerate(task):
                if of == name:
                    rewards[row] = values[row]
        return rewards

    return scored


def _accepted(function: Callable[..., Any]) -> Callable[[str], bool]:
    parameters = inspect.signature(function).parameters
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return lambda name: is_open or name in parameters


TASK = TaskKind(mixture_task, named("mixture"))
