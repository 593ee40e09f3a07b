"""What a configuration calls an object that a script has handed over, and that no name leads to."""

import functools as ft
import inspect
import sys
from collections.abc import Callable
from typing import Any

from ..files import import_spec_of
from ..tasks import REWARD_KINDS

_PREFIX = "python:"


def is_given(name: str) -> bool:
    """Whether this is what a configuration calls an object of a script."""
    return name.startswith(_PREFIX)


def shown_name(name: str) -> str:
    """A name of a configuration for messages: of an object of a script its class, and where it came from."""
    return f"{name.rpartition('.')[2]} of the script" if is_given(name) else name


def given_name(value: Any) -> str:
    """The qualified name of a function, or of another object's class: `python:package.module.Class`."""
    if isinstance(value, ft.partial):
        return given_name(value.func)
    named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    return f"{_PREFIX}{named.__module__}.{named.__qualname__}"


def reward_name(function: str | Callable[..., Any]) -> str:
    """What `reward.functions` calls a reward: as `--reward` would find it, where that is possible."""
    if isinstance(function, str):
        return function
    for name, kind in REWARD_KINDS.items():
        if kind.function is function and not kind.numbers:
            return name
    return import_spec_of(function) if _can_be_imported(function) else given_name(function)


def _can_be_imported(function: Callable[..., Any]) -> bool:
    """Whether another process finds the same function by its module and name. A script that was started is none such:
    to look into it would be to run it again."""
    if not inspect.isfunction(function) or function.__module__ == "__main__":
        return False
    module = sys.modules.get(function.__module__)
    return module is not None and vars(module).get(function.__qualname__) is function
