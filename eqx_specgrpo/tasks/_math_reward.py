"""The reward that compares mathematical answers as expressions, through the package math-verify."""

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..errors import UserError
from ._kind import RewardKind
from ._rewards import completion_text
from ._time_limit import OutOfTime, limited

# A completion may hold an expression that takes for ever to simplify. It is no right answer then.
_SECONDS = 5.0


def math_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """1 if the answer of a completion equals the right one as an expression, else 0: `0.5`, `1/2` and `\\frac{1}{2}`
    are the same, and so are `x = 3` and `3`. By [math-verify](https://github.com/huggingface/Math-Verify) (extra
    `math`), as TRL's `accuracy_reward` is.

    Which part of a completion is its answer is for that package to say: what is in `\\boxed{}` before anything else
    (two boxes are a set of two), else the last expression. One that can't be read, or takes more than 5 s to be
    compared, is wrong.

    **Arguments:**

    - `completions`: texts, or lists of messages.
    - `answer`: LaTeX, plain numbers, or a text that ends with the answer. The reward doesn't apply where it is `None`
        or nothing can be read of it.

    **Returns:**

    One reward a row.

    **Raises:**

    `UserError` if the package isn't installed.
    """
    del kwargs
    library = import_math_verify()
    rewards: list[float | None] = []
    with _quiet():
        # Each value of the column is read once: completions of a prompt share it.
        right = {value: _read_answer(library, value) for value in {str(a) for a in answer if a is not None}}
        for completion, value in zip(completions, answer, strict=True):
            gold = [] if value is None else right[str(value)]
            rewards.append(_compared(library, gold, completion_text(completion)) if gold else None)
    return rewards


def import_math_verify() -> ModuleType:
    """The package.

    **Raises:**

    `UserError` if it isn't installed.
    """
    try:
        return importlib.import_module("math_verify")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the reward math needs a package that isn't installed ({error.name}): pip install 'eqx_specgrpo[math]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's warning that its limits are off."""
    logger = logging.getLogger("math_verify")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _read_answer(library: ModuleType, value: str) -> list[Any]:
    """What is right, as the library has it; empty if it can't be read."""
    for text in (f"${value}$", value):  # LaTeX is only looked for between dollars, or in a box
        parsed = _parse(library, text)
        if parsed:
            return parsed
    return []


def _compared(library: ModuleType, gold: list[Any], text: str) -> float:
    try:
        with limited(_SECONDS):
            # Its own limits are off: they are made of the same timer as ours.
            return float(library.verify(gold, _parse(library, text), timeout_seconds=None))
    except (Exception, OutOfTime):  # whatever a completion makes the parser stumble over: a wrong answer
        return 0.0


def _parse(library: ModuleType, text: str) -> list[Any]:
    return library.parse(text, parsing_timeout=None)


REWARD = RewardKind(
    math_reward,
    "1 if the completion's last expression, or its `\\boxed{}`, equals the column `answer`, else 0 (math-verify)",
    check=import_math_verify,
)
