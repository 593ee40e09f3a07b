"""Calling reward functions as TRL does, and checking what they return; with the built-in ones that fit any task."""

import asyncio
import concurrent.futures
import inspect
import math
import re
import reprlib
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set as AbstractSet
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Float

from .._types import Message
from ..errors import Stopped, UserError

# What a function is given besides the columns; a column of such a name would take its place.
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
RewardFunction = Callable[..., Any]  # (prompts, completions, completion_ids, **columns) -> list[float | None]


class RewardError(UserError):
    """A reward function raised, or returned something that isn't one reward a row."""


class Rewards(eqx.Module):
    """Several reward functions with TRL's signature, and their weights.

    A function is called as `function(prompts=..., completions=..., completion_ids=..., **columns)` and returns one
    `float | None` a row; `None` means that it doesn't apply. It may be `async`. Without `**kwargs` it is given only the
    arguments it names, and `step` in no case unless it names that. Where a prompt is a list of messages, the completion
    is one too: `[{"role": "assistant", "content": ...}]`.

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

    def __call__(
        self,
        prompts: Sequence[str | list[Message]],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        step: int | None = None,
    ) -> tuple[Float[np.ndarray, "rows functions"], Float[np.ndarray, " rows"]]:
        """Scores completions.

        **Arguments:**

        - `prompts`: one a row, text or messages.
        - `completions`: one text a row.
        - `completion_ids`: one list of token ids a row, without padding.
        - `columns`: of the task, one value a row.
        - `step`: for functions that name it.

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
        columns_of_rewards = [
            _score(name, function, batch, prompts, step)
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        per_function = np.stack(columns_of_rewards, axis=1)
        total = np.nansum(per_function * np.array(self.weights, np.float64), axis=1)
        return per_function, np.where(np.isnan(per_function).all(axis=1), np.nan, total)


def _score(
    name: str, function: RewardFunction, batch: Mapping[str, Sequence[Any]], prompts: Sequence[Any], step: int | None
) -> Float[np.ndarray, " rows"]:
    names = _accepted(name, function, batch, step)
    extra = {"step": step} if "step" in names and "step" not in batch else {}
    batch = {key: batch[key] for key in names if key in batch}

    def call(row: int | None) -> Any:
        # Fresh lists, so that a function that changes its arguments changes no other function's.
        selected = slice(None) if row is None else slice(row, row + 1)
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


def _accepted(name: str, function: RewardFunction, batch: Mapping[str, Any], step: int | None) -> list[str]:
    """The names of the arguments to call the function with."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some compiled functions don't say
        return list(batch)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = list(batch) if open_ended else [key for key in batch if key in parameters]
    if step is not None and "step" in parameters and "step" not in names:
        names.append("step")
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


def think_format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """1 for a completion of the form `<think>...</think>...`, once each and with neither part blank, else 0."""
    del kwargs
    rewards = []
    for completion in completions:
        match = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", completion_text(completion), re.DOTALL)
        parts = match.groups() if match else ("",)
        rewards.append(float(all(part.strip() and not re.search("</?think>", part) for part in parts)))
    return rewards


def soft_overlong(max_completion_length: int, soft_punish_cache: int) -> RewardFunction:
    """The soft punishment of overlong completions of DAPO, in tokens.

    Zero up to `max_completion_length - soft_punish_cache` tokens, from there linearly down to -1.

    ??? cite "Reference"

        Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476, equation 13.

    **Arguments:**

    - `max_completion_length`: from how many tokens on the punishment is -1.
    - `soft_punish_cache`: over how many tokens it builds up.

    **Returns:**

    A reward function.
    """
    if not 0 < soft_punish_cache <= max_completion_length:
        raise UserError(
            f"soft_overlong({max_completion_length}, {soft_punish_cache}): give the maximal completion length, then "
            "over how many of its last tokens the punishment builds up, at least 1 and at most all"
        )

    def soft_overlong_reward(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        del kwargs
        free = max_completion_length - soft_punish_cache
        return [float(np.clip((free - len(ids)) / soft_punish_cache, -1.0, 0.0)) for ids in completion_ids]

    return soft_overlong_reward
