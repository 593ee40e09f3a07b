"""Numbers that a configuration may hold, but the arrays computed with can't."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import ConfigError

_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_MOST_ROWS = 2**20
# Taken as the lowest that can be computed with, see `sampling.as_temperature`.
_MAY_BE_TINY = ("grpo.temperature",)
_BELOW_ONE = ("grpo.adam_beta1", "grpo.adam_beta2")  # else a running mean never moves, and is divided by zero


def check_range(leaves: Iterable[tuple[str, Any]]) -> None:
    """Raises `ConfigError` for a number that 32 bits can't hold, and for steps of more rows than any machine can.

    **Arguments:**

    - `leaves`: dotted keys with their values. What belongs to a task is the task's to check.
    """
    values = dict(leaves)
    for key, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool) and not key.startswith("task."):
                _check_number(key, number)
    rows = values["grpo.num_generations"] * values["grpo.prompts_per_step"]
    if rows > _MOST_ROWS:
        raise ConfigError(
            f"grpo.num_generations * grpo.prompts_per_step = {rows}: a step can have {_MOST_ROWS} completions at most"
        )


def _check_number(key: str, number: int | float) -> None:
    if isinstance(number, int):
        limit = 2**32 if key == "seed" else 2**31
        if not -limit < number < limit:
            raise ConfigError(f"{key} = {number}: it must be a whole number below {limit}, as 32 bits can hold")
        return
    if abs(number) > _LARGEST:
        raise ConfigError(f"{key} = {number}: it must be at most {_LARGEST:.3g}, the largest number of 32 bits")
    if 0 < abs(number) < _SMALLEST and key not in _MAY_BE_TINY:
        raise ConfigError(
            f"{key} = {number}: it must be at least {_SMALLEST:.3g}, the smallest number of 32 bits, or 0 where "
            "that is allowed"
        )
    if key in _BELOW_ONE and np.float32(number) >= 1:
        raise ConfigError(f"{key} = {number}: it must be less than 1 in 32 bits too, such as 0.9999999")
