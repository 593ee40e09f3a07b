"""The reward that wants the right number at the end."""

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from ..errors import UserError
from ._kind import RewardKind
from ._numbers import last_number, parse_number
from ._rewards import completion_text


def arithmetic_reward(
    completions: Sequence[Any],
    answer: Sequence[Any],
    log_extra: Callable[[str, Sequence[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1 if the last number of a completion is exactly the answer, else 0; what comes before it is free.

    **Arguments:**

    - `completions`: texts, or lists of messages.
    - `answer`: one number or text of a number a row; `None` where the reward doesn't apply.
    - `log_extra`: is told the last numbers, as the column `extracted_answer`, by which an evaluation finds the answer
        of the majority.

    **Returns:**

    One reward a row.
    """
    del kwargs
    found = [last_number(completion_text(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("extracted_answer", [None if number is None else _as_text(number) for number in found])
    rewards: list[float | None] = []
    for number, value in zip(found, answer, strict=True):
        rewards.append(None if value is None else float(number == _gold(value)))
    return rewards


def _as_text(number: Decimal) -> str:
    """The same for equal numbers, however they are written; a short one, also of those with a large exponent."""
    is_plain = abs(number.adjusted()) < 18 and number == number.to_integral_value()
    return str(int(number)) if is_plain else str(number.normalize())


def _gold(answer: Any) -> Decimal:
    value = parse_number(answer)
    if value is None:
        raise UserError(f"the column `answer` holds {answer!r}, which isn't a number: keep the final number only")
    return value


REWARD = RewardKind(
    arithmetic_reward,
    "1 if the last number of the completion is the column `answer`, else 0",
)
