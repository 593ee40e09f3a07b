"""Calling reward functions as TRL does, and checking what they return."""

import asyncio
import concurrent.futures
import inspect
import math
import reprlib
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set as AbstractSet
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Float

from .._types import Message
from ..errors import Stopped, UserError
from ._reward_context import RewardLog, TrainerState

# What a function is given besides what a task has; a column of such a name would take its place.
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
# (prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list[float | None]
RewardFunction = Callable[..., Any]


class RewardError(UserError):
    """A reward function raised, or returned something that isn't one reward a row."""


class Rewards(eqx.Module):
    """Several reward functions with TRL's signature, and their weights.

    A function is called as `function(prompts=..., completions=..., completion_ids=..., trainer_state=...,
    log_extra=..., log_metric=..., **columns)` and returns one `float | None` a row; `None` means that it doesn't apply.
    It may be `async`. Without `**kwargs` it is given only the arguments it names, and `step` (counted from 1) in no
    case unless it names that. Where a prompt is a list of messages, the completion is one too: `[{"role": "assistant",
    "content": ...}]`. `log_extra(column, values)` adds a column to the completions' records, `log_metric(name, value)`
    a metric to the step's. A column of the task goes before an argument of the same name.

    **Arguments:**

    - `names`: of the functions, all different.
    - `functions`: as above.
    - `weights`: one a function.
    """

    names: tuple[str, ...]
    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]

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

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises [`eqx_specgrpo.tasks.RewardError`][] if a function needs a column that the task has not."""
        batch = ["prompts", "completions", "completion_ids", *columns]
        for name, function in zip(self.names, self.functions, strict=True):
            _accepted(name, function, batch, ("trainer_state", "log_extra", "log_metric", "step"))

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

        [`eqx_specgrpo.tasks.RewardError`][] if a function raises, returns the wrong number of rewards, or one that
        isn't a finite number or `None`.
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
        columns_of_rewards = [
            _score(name, function, batch, _Context(step, trainer_state, log))
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        per_function = np.stack(columns_of_rewards, axis=1)
        total = np.nansum(per_function * np.array(self.weights, np.float64), axis=1)
        return per_function, np.where(np.isnan(per_function).all(axis=1), np.nan, total)


class _Context(NamedTuple):
    """What functions may ask for besides the batch."""

    step: int | None
    trainer_state: TrainerState | None
    log: RewardLog

    def arguments(self) -> dict[str, Any]:
        """By name; `step`, which TRL has not, only for functions that name it."""
        given = {"trainer_state": self.trainer_state, "log_extra": self.log.log_extra}
        given |= {"log_metric": self.log.log_metric, "step": self.step}
        return {name: value for name, value in given.items() if value is not None}


def _score(
    name: str, function: RewardFunction, batch: Mapping[str, Sequence[Any]], context: _Context
) -> Float[np.ndarray, " rows"]:
    prompts = batch["prompts"]
    names = _accepted(name, function, batch, context.arguments())
    batch = {key: batch[key] for key in names if key in batch}

    def call(row: int | None) -> Any:
        # Fresh lists, so that a function that changes its arguments changes no other function's.
        selected = slice(None) if row is None else slice(row, row + 1)
        log = context.log if row is None else RewardLog(None)  # of a call that looks for the row: dropped
        extra = context._replace(log=log).arguments()
        extra = {key: extra[key] for key in names if key not in batch}
        result = function(**{key: list(values)[selected] for key, values in batch.items()}, **extra)
        return _wait_for(result) if inspect.isawaitable(result) else result

    try:
        result = call(None)
    except Stopped:
        raise
    except KeyboardInterrupt as error:
        error.add_note(f"in the reward {name!r}")  # in a notebook it is the user's, and ends what is being done
        raise
    except BaseException as error:  # sys.exit() among them: how a program ends is not for a reward to say
        raise RewardError(_explain(name, error, call, prompts)) from error
    return _checked(name, result, len(prompts))


def _accepted(name: str, function: RewardFunction, batch: Iterable[str], further: Iterable[str]) -> list[str]:
    """The names of the arguments to call the function with.

    **Arguments:**

    - `batch`: names of the columns that there are.
    - `further`: what there is besides.
    """
    batch, further = list(batch), list(further)
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some compiled functions don't say
        return batch
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = batch if open_ended else [key for key in batch if key in parameters]
    names = names + [
        key for key in further if key not in batch and (key in parameters or (open_ended and key != "step"))
    ]
    for parameter in parameters.values():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if parameter.kind is parameter.POSITIONAL_ONLY and required:
            raise RewardError(f"the reward {name!r} takes {parameter.name!r} by position only: drop the '/'")
        if required and parameter.name not in names:
            given = ", ".join(repr(key) for key in batch)
            raise RewardError(
                f"the reward {name!r} needs {parameter.name!r}, which the task has no column for; there are {given}. "
                "Add the column, or choose another reward."
            )
    return names


def _wait_for(awaitable: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with concurrent.futures.ThreadPoolExecutor(1) as executor:  # a notebook runs a loop of its own
        return executor.submit(asyncio.run, wait()).result()


def _explain(name: str, error: BaseException, call: Callable[[int], Any], prompts: Sequence[Any]) -> str:
    rows = len(prompts)
    for row, prompt in enumerate(prompts):
        try:
            call(row)
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException as alone:
            if type(alone) is not type(error):
                continue  # not what happened to the batch
            where = f"item {row} of {rows}, the prompt {_shortened(prompt)}"
            return f"the reward {name!r} raised {_described(alone)} on {where}"
    return f"the reward {name!r} raised {_described(error)} on a batch of {rows}, though on no item alone"


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}" if str(error) else f"{type(error).__name__}{place}"


def _shortened(prompt: Any, width: int = 80) -> str:
    text = repr(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    return text if len(text) <= width else text[: width - 3] + "..."


def _checked(name: str, result: Any, rows: int) -> Float[np.ndarray, " rows"]:
    if isinstance(result, str | bytes | Mapping | AbstractSet):
        values = None
    else:
        try:
            values = list(result)
        except TypeError:
            values = None
        except Exception as error:  # of a generator, which runs only now
            raise RewardError(f"the reward {name!r} raised {_described(error)} while its rewards were read") from error
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
    """The text of a completion as a reward function is given it: as it is, or the contents of its messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion)
