"""Calling reward functions as TRL does, and checking what they return."""

import math
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set as AbstractSet
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Float

from .._types import Message
from ..errors import UserError
from ._reward_call import RewardCall, RewardContext, RewardError, RewardFunction, accepted, described, run_all
from ._reward_context import RewardLog, TrainerState

# What a function is given besides what a task has; a column of such a name would take its place.
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")


class Rewards(eqx.Module):
    """Several reward functions with TRL's signature, and their weights.

    A function is called as `function(prompts=..., completions=..., completion_ids=..., trainer_state=...,
    log_extra=..., log_metric=..., **columns)` and returns one `float | None` a row; `None` means that it doesn't apply.
    It may be `async`; several that are run at the same time. Without `**kwargs` it is given only the arguments it
    names, and `step` (counted from 1) in no case unless it names that. Where a prompt is a list of messages, the
    completion is one too: `[{"role": "assistant", "content": ...}]`. `log_extra(column, values)` adds a column to the
    completions' records, `log_metric(name, value)` a metric to the step's. A column of the task goes before an argument
    of the same name.

    **Arguments:**

    - `names`: names of the functions, all different.
    - `functions`: as above.
    - `weights`: one per function.
    - `timeout`: seconds that each function has for a call. An `async` one is stopped where it waits; others only in the
        main thread, and not on Windows.
    """

    names: tuple[str, ...]
    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]
    timeout: float = math.inf

    def __check_init__(self):
        if not self.names:
            raise UserError("no reward function: give at least one")
        if len(set(self.names)) < len(self.names):
            raise UserError(f"the rewards {list(self.names)} aren't all different: give each once, and a weight")
        if len(self.functions) != len(self.names) or len(self.weights) != len(self.names):
            raise UserError(f"{len(self.names)} rewards but {len(self.weights)} weights: give one weight a reward")
        for name, weight in zip(self.names, self.weights, strict=True):
            if not math.isfinite(weight):
                raise UserError(f"the weight of the reward {name!r} is {weight}: give a finite number")
        if not self.timeout > 0:
            raise UserError(f"the time limit of rewards is {self.timeout} s, but must be above 0")

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises [`eqx_specgrpo.tasks.RewardError`][] if a function needs a column that the task lacks."""
        batch = ["prompts", "completions", "completion_ids", *columns]
        for name, function in zip(self.names, self.functions, strict=True):
            accepted(name, function, batch, ("trainer_state", "log_extra", "log_metric", "step"))

    def __call__(
        self,
        prompts: Sequence[str | list[Message]],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        step: int | None = None,
        trainer_state: TrainerState | None = None,
        log: RewardLog | None = None,
    ) -> tuple[Float[np.ndarray, "rows functions"], Float[np.ndarray, " rows"]]:
        """Scores completions.

        **Arguments:**

        - `prompts`: one a row, text or messages.
        - `completions`: one text a row.
        - `completion_ids`: one list of token ids a row, without padding.
        - `columns`: of the task, one value a row.
        - `step`: for functions that name it.
        - `trainer_state`: where training is, for functions that want it.
        - `log`: takes what functions write down; by default it is dropped.

        **Returns:**

        In float64: each function's rewards, NaN where it doesn't apply; and their weighted sum over the functions that
        apply, NaN where none does.

        **Raises:**

        [`eqx_specgrpo.tasks.RewardError`][] if a function raises, takes longer than it may, returns the wrong number of
        rewards, or one that isn't a finite number or `None`.
        """
        wrapped = [
            completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        taken = [name for name in RESERVED_COLUMNS if name in columns]
        if taken:
            raise UserError(
                f"the task has a column {taken[0]!r}, the name under which rewards are given something else: rename it"
            )
        batch = {"prompts": prompts, "completions": wrapped, "completion_ids": completion_ids, **columns}
        for name, values in batch.items():
            if len(values) != len(completions):
                raise UserError(f"{len(completions)} completions but {len(values)} values of {name!r}")
        log = RewardLog(len(completions)) if log is None else log
        context = RewardContext(step, trainer_state, log)
        calls = [
            RewardCall(name, function, batch, context)
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        results = run_all(calls, self.timeout)
        checked = [_checked(name, result, len(prompts)) for name, result in zip(self.names, results, strict=True)]
        per_function = np.stack(checked, axis=1)
        total = np.nansum(per_function * np.array(self.weights, np.float64), axis=1)
        unrewarded = np.isnan(per_function).all(axis=1)
        if unrewarded.any():
            warnings.warn(
                "no reward function applies to some of the completions (all returned None): these teach the policy "
                "nothing. Has each item the column that one of the functions needs?",
                stacklevel=2,
            )
        return per_function, np.where(unrewarded, np.nan, total)


def _checked(name: str, result: Any, rows: int) -> Float[np.ndarray, " rows"]:
    if isinstance(result, str | bytes | Mapping | AbstractSet):
        values = None
    else:
        try:
            values = list(result)
        except TypeError:
            values = None
        except Exception as error:  # of a generator, which runs only now
            raise RewardError(f"the reward {name!r} raised {described(error)} while its rewards were read") from error
    if values is None:
        raise RewardError(f"the reward {name!r} returned {type(result).__name__}, expected a list of {rows} numbers")
    if len(values) != rows:
        raise RewardError(f"the reward {name!r} returned {len(values)} rewards, expected {rows}: one a completion")
    checked = np.full(rows, np.nan)
    for row, value in enumerate(values):
        if value is None:
            continue
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except Exception:  # whatever the user's own types raise
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"the reward {name!r} returned {reprlib.repr(value)} for item {row} of {rows}: "
                "return a finite number, or None where it doesn't apply"
            )
        checked[row] = number
    return checked


def completion_text(completion: str | list[Message]) -> str:
    """Returns the text of a completion, which is a text or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion)
