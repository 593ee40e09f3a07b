"""From what a user writes in a configuration to tasks and rewards."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pydantic

from ..errors import UserError, did_you_mean
from ..files import import_callable
from ._arithmetic import Arithmetic, arithmetic_reward, running_totals_reward
from ._base import AbstractTask
from ._jsonl import JsonlTask
from ._reasoning_gym import ReasoningGymTask
from ._rewards import RewardFunction, Rewards, soft_overlong, think_format_reward

_KINDS = "a file ending in .jsonl, or reasoning_gym:NAME"


def load_task(name: str, seed: int, options: Mapping[str, Any]) -> AbstractTask:
    """Builds a task.

    **Arguments:**

    - `name`: `"arithmetic"`, the path of a `.jsonl` file, or `"reasoning_gym:NAME"`.
    - `seed`: of the items and their order.
    - `options`: further arguments of the task's class.

    **Returns:**

    The task.

    **Raises:**

    `UserError` for an unknown name or option, or an option of the wrong type or out of range.
    """
    gym, colon, dataset = name.partition(":")
    if name == "arithmetic":
        _check_options(name, Arithmetic.__init__, options)
        return Arithmetic(seed=seed, **options)
    if name.endswith(".jsonl"):
        _check_options(name, JsonlTask.__init__, options)
        return JsonlTask(name, seed=seed)
    if gym == "reasoning_gym" and colon:
        _check_options(name, ReasoningGymTask.__init__, options)
        return ReasoningGymTask(dataset, seed=seed, **options)
    suggestion = did_you_mean(name, ("arithmetic", "reasoning_gym:"))
    if suggestion.startswith(" Did"):
        suggestion += f" (Or {_KINDS}.)"
    else:
        suggestion = f" The choices are: arithmetic, {_KINDS}."
    raise UserError(f"there is no task {name!r}.{suggestion}")


def _check_options(task: str, init: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = dict(inspect.signature(init).parameters)
    for given_otherwise in ("self", "seed", "name", "path"):
        parameters.pop(given_otherwise, None)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = {name: p.annotation for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    for name, value in options.items():
        if name in ("seed", "name", "path"):
            raise UserError(f"{name!r} is no option of the task {task!r}, it is given beside the options")
        if name not in own:
            if open_ended:
                continue
            hint = did_you_mean(name, own) or " It has no options."
            raise UserError(f"the task {task!r} has no option {name!r}.{hint}")
        adapter = pydantic.TypeAdapter(own[name], config=pydantic.ConfigDict(strict=True))
        try:
            adapter.validate_python(value)
        except pydantic.ValidationError as error:
            reasons = " or ".join(dict.fromkeys(item["msg"] for item in error.errors()))
            raise UserError(f"the option {name!r} of the task {task!r} can't be {value!r}: {reasons}") from error


def load_rewards(specs: Sequence[str], weights: Sequence[float] | None, task: AbstractTask) -> Rewards:
    """Finds reward functions.

    **Arguments:**

    - `specs`: for each function one of: a name that the task knows; `"arithmetic"`, `"running_totals"`,
        `"think_format"` or `"soft_overlong(L, C)"`; `"package.module:function"`; `"file.py:function"`. If there are
        none, the task's own are taken.
    - `weights`: one a function; all 1 if `None`.
    - `task`: whose rewards they are.

    **Returns:**

    The functions, with names and weights.

    **Raises:**

    `UserError` for what can't be found or isn't callable, and for a number of weights that doesn't fit.
    """
    own = dict(task.default_rewards())
    if not specs and not own:
        raise UserError(
            f"{type(task).__name__} has no reward of its own: give one as --reward, such as think_format, "
            "package.module:function or file.py:function"
        )
    specs = list(specs) or list(own)
    for spec in specs:
        if specs.count(spec) > 1:
            raise UserError(f"the reward {spec!r} is given {specs.count(spec)} times: give it once, with a weight")
    found = [_find(spec, own) for spec in specs]
    short = [name for name, _ in found]
    names = [name if short.count(name) == 1 else spec for name, spec in zip(short, specs, strict=True)]
    if weights is None:
        weights = [1.0] * len(specs)
    if len(weights) != len(specs):
        raise UserError(
            f"{len(specs)} rewards ({', '.join(specs)}) but {len(weights)} weights: give one weight a reward"
        )
    return Rewards(tuple(names), tuple(function for _, function in found), tuple(float(weight) for weight in weights))


def _find(spec: str, own: Mapping[str, RewardFunction]) -> tuple[str, RewardFunction]:
    named = {
        "arithmetic": arithmetic_reward,
        "running_totals": running_totals_reward,
        "think_format": think_format_reward,
        **own,
    }
    if spec in named:
        return spec, named[spec]
    overlong = re.fullmatch(r"soft_overlong\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\)", spec)
    if overlong:
        return "soft_overlong", soft_overlong(int(overlong.group(1)), int(overlong.group(2)))
    if spec.startswith("soft_overlong"):
        raise UserError(f"the reward {spec!r} must say its numbers of tokens: soft_overlong(max length, cache)")
    source, colon, function = spec.rpartition(":")
    if not colon:
        if spec.endswith(".py"):
            raise UserError(f"the reward {spec!r} must say which function of the file it is: {spec}:FUNCTION")
        hint = did_you_mean(spec, [*named, "soft_overlong(L, C)"])
        raise UserError(f"there is no reward {spec!r}.{hint} (Or package.module:function, or file.py:function.)")
    return function, import_callable(spec, "reward", "function")
