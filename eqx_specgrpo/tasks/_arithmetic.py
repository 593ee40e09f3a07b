"""Arithmetic problems without end, and rewards that check them exactly."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from ..errors import UserError
from ._base import AbstractTask, Example, check_index
from ._numbers import find_numbers, last_number, parse_number
from ._rewards import completion_text


class Arithmetic(AbstractTask):
    """Sums, differences and products of random whole numbers; item i depends on the seed and i alone.

    Columns: `answer` (text of a whole number) and `expression`.
    """

    seed: int
    terms: tuple[int, int]
    low: int
    high: int
    operations: str
    size: int | None
    prompt: str
    chat: bool

    def __init__(
        self,
        seed: int = 0,
        terms: int | Sequence[int] = (2, 2),
        low: int = 10,
        high: int = 49,
        operations: str = "+",
        size: int | None = None,
        prompt: str = "What is {expression}? Think step by step.",
        chat: bool = True,
    ):
        """**Arguments:**

        - `seed`: of the problems, and of their order if there is a `size`.
        - `terms`: number of operands, or an inclusive range of it.
        - `low`, `high`: inclusive range of the operands.
        - `operations`: which of `+`, `-` and `*` occur; `*` binds more tightly, and results may be negative.
        - `size`: number of distinct problems; `None` for no end.
        - `prompt`: what is asked; `{expression}` stands for the problem.
        - `chat`: whether the prompt is one user message, or plain text for a model without a chat template.
        """
        shortest, longest = (terms, terms) if isinstance(terms, int) else _pair(terms)
        if not 2 <= shortest <= longest:
            raise UserError(f"`terms` is {terms}: give a number of operands, at least 2, or a range such as [2, 5]")
        if not 0 <= low <= high:
            raise UserError(f"operands from `low` {low} to `high` {high}: choose 0 <= low <= high")
        if not operations or not set(operations) <= set("+-*"):
            raise UserError(f"`operations` is {operations!r}: give one or several of '+', '-' and '*', such as '+-'")
        if size is not None and size < 1:
            raise UserError(f"`size` is {size}: give at least 1 problem, or leave it out for no end")
        if "{expression}" not in prompt:
            raise UserError(f"`prompt` is {prompt!r}: it must say {{expression}} where the problem belongs")
        self.seed = seed
        self.terms = (shortest, longest)
        self.low = low
        self.high = high
        self.operations = operations
        self.size = size
        self.prompt = prompt
        self.chat = chat

    def example(self, index: int) -> Example:
        check_index(index, self.size)
        # Of Python's generator only `random()` on a text seed is promised to stay the same from version to version.
        uniform = random.Random(f"arithmetic/{self.seed}/{index}").random

        def draw(low: int, high: int) -> int:
            return low + int(uniform() * (high - low + 1))

        expression = str(draw(self.low, self.high))
        for _ in range(draw(*self.terms) - 1):
            operation = self.operations[draw(0, len(self.operations) - 1)]
            expression += f" {operation} {draw(self.low, self.high)}"
        content = self.prompt.replace("{expression}", expression)
        prompt = [{"role": "user", "content": content}] if self.chat else content
        return Example(prompt, {"answer": str(running_totals(expression)[-1]), "expression": expression})

    def default_rewards(self) -> Mapping[str, Callable[..., Any]]:
        return {"arithmetic": arithmetic_reward}


def _pair(terms: Sequence[int]) -> tuple[int, int]:
    if len(terms) != 2:
        raise UserError(f"`terms` is {terms}: a range has two ends, such as [2, 5]")
    return terms[0], terms[1]


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


def _gold(answer: Any) -> Decimal:
    value = parse_number(answer)
    if value is None:
        raise UserError(f"the column `answer` holds {answer!r}, which isn't a number: keep the final number only")
    return value
