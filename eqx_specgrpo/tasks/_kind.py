"""What the library knows of each kind of task and of each built-in reward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..choices import Options, options_of
from ._base import AbstractTask


@dataclass(frozen=True)
class TaskKind:
    """Description of a kind of task, by which a configuration can name it. Each task's file ends with one, `TASK`.

    **Arguments:**

    - `task`: a class or a function, called as `task(*arguments, seed=seed, **options)`. Its further keyword arguments
        are the options: the keys of `[task]`, checked against their annotations, and described in the docstring of the
        function, or of the class's `__init__`.
    - `arguments`: from the name in the configuration to the leading arguments; `None` if the name is not of this kind.
    - `is_file`: whether that name is the path of a file or folder.
    """

    task: Callable[..., AbstractTask]
    arguments: Callable[[str], tuple[str, ...] | None]
    is_file: bool = False

    def options(self, name: str) -> Options:
        """Returns the options of a task of this kind."""
        leading = len(self.arguments(name) or ())
        return options_of(self.task, f"the task {name!r}", "task.", given=("seed", "name", "path"), first=leading)


def named(name: str) -> Callable[[str], tuple[str, ...] | None]:
    """For a kind of one task: the name is exactly this."""
    return lambda given: () if given == name else None


@dataclass(frozen=True)
class RewardKind:
    """Description of a built-in reward. Each reward's file ends with one, `REWARD`.

    **Arguments:**

    - `function`: the reward itself; or, where there are `numbers`, what makes it of them.
    - `summary`: what it rewards, in a line.
    - `numbers`: the whole numbers that stand in parentheses after its name, each in a word or two.
    - `check`: called when it is named, raises `UserError` if what it needs isn't there; `None`: it needs nothing.
    """

    function: Callable[..., Any]
    summary: str
    numbers: tuple[str, ...] = ()
    check: Callable[[], Any] | None = None
