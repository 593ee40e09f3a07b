"""The reward that wants the right number at the end."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ..errors import UserError
from ._kind import RewardKind
from ._numbers import last_number, parse_number
from ._rewards import completion_text


def arithmetic_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """1 if the last number of a completion is exactly the answer, else 0; what comes before it is free.

    **Arguments:**

    - `completions`: texts, or lists of messages.
    - `answer`: one number or text of a number a row; `None` where the reward doesn't apply.

    **Returns:**

    One reward a row.
    """
    del kwargs
    rewards = []
    for completion, value in zip(completions, answer, strict=True):
        if value is None:
            rewards.append(None)
        else:
            rewards.append(float(last_number(completion_text(completion)) == _gold(value)))
    return rewards


def _gold(answer: Any) -> Decimal:
    value = parse_number(answer)
    if value is None:
        raise UserError(f"the column `answer` holds {answer!r}, which isn't a number: keep the final number only")
    return value


REWARD = RewardKind(
    arithmetic_reward,
    "1 if the last number of the completion is the column `answer`, else 0",
)
