"""The steps of an expression, and the reward that wants them stated."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ..errors import UserError
from ._kind import RewardKind
from ._numbers import find_numbers
from ._rewards import completion_text


def running_totals(expression: str) -> list[int]:
    """The results of an expression's steps, worked from left to right, products first within their term.

    **Arguments:**

    - `expression`: whole numbers joined by `+`, `-` and `*`, such as `"2 + 3 * 4 - 5"`.

    **Returns:**

    One whole number for each operation, for the example above `[12, 14, 9]`; the last one is the value.
    """
    if not re.fullmatch(r"\s*[0-9]+(\s*[-+*]\s*[0-9]+)*\s*", expression):
        raise UserError(f"the expression {expression!r} isn't whole numbers joined by '+', '-' and '*'")
    steps = []
    total = 0
    for position, term in enumerate(re.findall(r"[-+]?[0-9\s*]+", re.sub(r"\s", "", expression))):
        first, *factors = term.lstrip("+-").split("*")
        product = int(first)
        for factor in factors:
            product *= int(factor)
            steps.append(product)
        total += -product if term.startswith("-") else product
        if position > 0:
            steps.append(total)
    return steps or [total]


def running_totals_reward(completions: Sequence[Any], expression: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """The fraction of the steps of an expression that a completion gets right, so that working them out pays.

    The last step counts if the last number of the completion is the answer; the earlier ones count if their results
    ([`eqx_specgrpo.tasks.running_totals`][]) are stated before it, in order. Neither operands nor entries of lists are
    statements of a result: writing all the numbers down earns nothing.

    **Arguments:**

    - `completions`: texts, or lists of messages.
    - `expression`: one expression a row; `None` where the reward doesn't apply.

    **Returns:**

    One reward a row, from 0 to 1; 1 only if every step and the answer are right.
    """
    del kwargs
    rewards = []
    for completion, problem in zip(completions, expression, strict=True):
        if problem is None:
            rewards.append(None)
            continue
        *totals, value = [Decimal(total) for total in running_totals(problem)]
        numbers = find_numbers(completion_text(completion))
        stated = [number.value for number in numbers[:-1] if number.is_result]
        right = bool(numbers) and numbers[-1].value == value
        rewards.append((_longest_common_subsequence(totals, stated) + right) / (len(totals) + 1))
    return rewards


def _longest_common_subsequence(xs: Sequence[Decimal], ys: Sequence[Decimal | None]) -> int:
    previous = [0] * (len(xs) + 1)
    for y in ys:
        current = [0]
        for i, x in enumerate(xs):
            current.append(previous[i] + 1 if x == y else max(previous[i + 1], current[i]))
        previous = current
    return previous[-1]


REWARD = RewardKind(
    running_totals_reward,
    "the share of the steps of the column `expression` that the completion gets right; no credit for listing numbers",
)
