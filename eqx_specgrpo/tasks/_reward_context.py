"""What a reward function may ask for besides the completions: where training is, and a place to write things down."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError


@dataclass(frozen=True)
class TrainerState:
    """The progress of training, under the names of transformers' `TrainerState`.

    **Arguments:**

    - `global_step`: number of steps done so far; 0 in the first step.
    - `max_steps`: number of steps in all.
    - `epoch`: number of passes over the task's items so far; `None` if the task has no end.
    """

    global_step: int
    max_steps: int
    epoch: float | None


class RewardLog:
    """Values that reward functions log for one batch of completions.

    **Arguments:**

    - `rows`: number of completions; with `None`, columns of any length are accepted.

    **Attributes:**

    - `extra`: further columns of the completions, one value per row.
    - `metrics`: further metrics of the step: the mean of what was logged under a name.
    """

    extra: dict[str, list[Any]]

    def __init__(self, rows: int | None):
        self.extra = {}
        self._rows = rows
        self._logged: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Adds a column to the records of the completions."""
        values = list(values)
        if self._rows is not None and len(values) != self._rows:
            raise UserError(f"log_extra({column!r}) was given {len(values)} values for {self._rows} completions")
        self.extra[column] = [_plain(value) for value in values]

    def log_metric(self, name: str, value: float | int | np.number) -> None:
        """Adds to a metric of the step."""
        number = float(value)
        if not math.isfinite(number):
            raise UserError(f"log_metric({name!r}) was given {value!r}: log a finite number, or nothing")
        self._logged.setdefault(name, []).append(number)

    @property
    def metrics(self) -> dict[str, float]:
        """Returns the mean of the values that were logged under each name."""
        return {name: float(np.mean(values)) for name, values in self._logged.items()}


def _plain(value: Any) -> Any:
    """As JSON can hold it; what it cannot hold is told as text."""
    if isinstance(value, np.generic):
        return value.item()
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value
