"""One call of a reward function: with what it names, within its time, and, if it fails, on which item."""

import asyncio
import concurrent.futures
import inspect
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import Stopped, UserError
from ._reward_context import RewardLog, TrainerState
from ._time_limit import OutOfTime, limited

# (prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list[float | None]
RewardFunction = Callable[..., Any]


class RewardError(UserError):
    """Raised where a reward function raises, takes too long, or does not return one reward per row."""


class RewardContext(NamedTuple):
    """What functions may ask for besides the batch."""

    step: int | None
    trainer_state: TrainerState | None
    log: RewardLog

    def arguments(self) -> dict[str, Any]:
        """By name; `step`, which TRL has not, only for functions that name it."""
        given = {"trainer_state": self.trainer_state, "log_extra": self.log.log_extra}
        given |= {"log_metric": self.log.log_metric, "step": self.step}
        return {name: value for name, value in given.items() if value is not None}


class RewardCall:
    """A function with what it is given.

    **Arguments:**

    - `name`: of the reward.
    - `function`: itself.
    - `batch`: columns by name, one value a row; `prompts` among them.
    - `context`: what there is besides.
    """

    def __init__(self, name: str, function: RewardFunction, batch: Mapping[str, Sequence[Any]], context: RewardContext):
        self.name = name
        self.prompts = batch["prompts"]
        self._function = function
        self._names = accepted(name, function, batch, context.arguments())
        self._batch = {key: batch[key] for key in self._names if key in batch}
        self._context = context

    def __call__(self, row: int | None = None) -> Any:
        """What the function returns for all rows, or for one; that may have to be awaited."""
        # Fresh lists, so that a function that changes its arguments changes no other function's.
        selected = slice(None) if row is None else slice(row, row + 1)
        log = self._context.log if row is None else RewardLog(None)  # of a call that looks for the row: dropped
        extra = self._context._replace(log=log).arguments()
        extra = {key: extra[key] for key in self._names if key not in self._batch}
        return self._function(**{key: list(values)[selected] for key, values in self._batch.items()}, **extra)


def run_all(calls: Sequence[RewardCall], timeout: float) -> list[Any]:
    """What the functions return. Those that have to be awaited run at the same time, after the others.

    **Arguments:**

    - `timeout`: seconds that each of them has.

    **Raises:**

    [`eqx_specgrpo.tasks.RewardError`][] if one raises or takes longer; with the item, if one alone does that.
    """
    results: list[Any] = []
    try:
        for call in calls:
            results.append(_result(call, timeout))
    except BaseException:
        for result in results:
            if inspect.iscoroutine(result):
                result.close()  # it will not be awaited
        raise
    waiting = [index for index, result in enumerate(results) if inspect.isawaitable(result)]
    for index, outcome in zip(waiting, _wait_for([results[i] for i in waiting], timeout), strict=True):
        if isinstance(outcome, _Failed):
            raise RewardError(_explain(calls[index], outcome.error, timeout)) from outcome.error
        results[index] = outcome
    return results


def _result(call: RewardCall, timeout: float) -> Any:
    try:
        with limited(timeout):
            return call()
    except Stopped:
        raise
    except KeyboardInterrupt as error:
        error.add_note(f"in the reward {call.name!r}")  # in a notebook it is the user's, and ends what is being done
        raise
    except BaseException as error:  # sys.exit() among them: how a program ends is not for a reward to say
        raise RewardError(_explain(call, error, timeout)) from error


class _Failed(NamedTuple):
    """Of what was awaited."""

    error: BaseException


def _wait_for(awaitables: Sequence[Awaitable[Any]], timeout: float) -> list[Any]:
    """The outcomes of all; `_Failed` in the place of one that failed or took longer."""
    if not awaitables:
        return []

    async def outcome(awaitable: Awaitable[Any]) -> Any:
        scope = asyncio.timeout(None if timeout == math.inf else timeout)
        try:
            async with scope:
                return await awaitable
        except (Stopped, KeyboardInterrupt, asyncio.CancelledError):
            raise
        except BaseException as error:
            return _Failed(OutOfTime() if scope.expired() else error)

    async def wait() -> list[Any]:
        return await asyncio.gather(*map(outcome, awaitables))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with concurrent.futures.ThreadPoolExecutor(1) as executor:  # a notebook runs a loop of its own
        return executor.submit(asyncio.run, wait()).result()


def accepted(name: str, function: RewardFunction, batch: Iterable[str], further: Iterable[str]) -> list[str]:
    """The names of the arguments to call the function with.

    **Arguments:**

    - `batch`: names of the columns that there are.
    - `further`: what there is besides.

    **Raises:**

    [`eqx_specgrpo.tasks.RewardError`][] if the function needs something else.
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


def _explain(call: RewardCall, error: BaseException, timeout: float) -> str:
    """What happened, and on which item, if it happens with one alone. Looking for that takes `timeout` again at most.

    An item that takes half of the time alone is the one that time ran out for.
    """
    rows, began = len(call.prompts), time.monotonic()
    ran_out = isinstance(error, OutOfTime)
    late = f"the reward {call.name!r} took more than the {timeout:g} s that it has (reward.timeout)"
    for row, prompt in enumerate(call.prompts):
        where = f"item {row} of {rows}, the prompt {_shortened(prompt)}"
        alone = _failure_alone(call, row, timeout / 2)
        if ran_out and isinstance(alone, OutOfTime):
            return f"{late}; alone it takes more than half of that on {where}"
        if alone is not None and type(alone) is type(error):
            return f"the reward {call.name!r} raised {described(alone)} on {where}"
        if time.monotonic() - began > timeout:
            break
    if ran_out:
        return f"{late} on a batch of {rows}, though not on one item alone: give it more, or make it faster"
    return f"the reward {call.name!r} raised {described(error)} on a batch of {rows}, though on no item alone"


def _failure_alone(call: RewardCall, row: int, seconds: float) -> BaseException | None:
    try:
        with limited(seconds):
            result = call(row)
        if inspect.isawaitable(result):
            (outcome,) = _wait_for([result], seconds)
            return outcome.error if isinstance(outcome, _Failed) else None
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        return error
    return None


def described(error: BaseException) -> str:
    """An error and its place, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}" if str(error) else f"{type(error).__name__}{place}"


def _shortened(prompt: Any, width: int = 80) -> str:
    text = repr(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    return text if len(text) <= width else text[: width - 3] + "..."
