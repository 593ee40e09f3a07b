"""Arithmetic problems without end."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ._arithmetic_reward import arithmetic_reward
from ._base import AbstractTask, Example, check_index
from ._kind import TaskKind, named
from ._running_totals import running_totals


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


TASK = TaskKind(Arithmetic, named("arithmetic"))
