"""What a benchmark is asked for, and what is wrong with it."""

import math
from typing import Any

import equinox as eqx

from ..decoding import VERIFIER_KINDS, AbstractVerifier, FixedLength, make_verifier
from ..errors import UserError

_MOST_ROWS = 2**16


class BenchSettings(eqx.Module):
    """What to measure.

    **Arguments:**

    - `rows`: completions decoded together; each number is measured by itself.
    - `lengths`: tokens drafted a round. Plain decoding is always measured too.
    - `adaptive`: also let an `AdaptiveLength` choose, up to the greatest of `lengths`.
    - `verifiers`: `rejection`, `block`, `coupled`, `greedy` (at temperature 0 only); by default `block`, or
        `greedy` at temperature 0.
    - `max_completion_length`: the longest completion, in tokens.
    - `ignore_eos`: go on after an end of sequence, to `max_completion_length` tokens (or the model's context). Every
        decoding then has as many tokens to make, so that a ratio of two says nothing of when completions happened to
        end. Drafts are distilled on completions that end all the same.
    - `samples`: completions a prompt; divides each of `rows`.
    - `temperature`, `top_k`, `top_p`, `min_p`: of sampling; temperature 0 is greedy.
    - `rounds`: how often everything is measured.
    - `minutes`: for preparing a draft that has to be distilled, its generations included.

    **Raises:**

    `UserError` for what does not make sense.
    """

    rows: tuple[int, ...] = (4, 8, 16)
    lengths: tuple[int, ...] = (1, 2, 3, 4)
    adaptive: bool = False
    verifiers: tuple[str, ...] = ()
    max_completion_length: int = 128
    ignore_eos: bool = False
    samples: int = 4
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    rounds: int = 5
    minutes: float = 1.0

    def __check_init__(self):
        for name, value in (("rows", self.rows), ("lengths", self.lengths), ("verifiers", self.verifiers)):
            if len(set(value)) < len(value):
                raise UserError(f"--{name} {','.join(map(str, value))} names something twice: name it once")
        longest = ("max-completion-length", self.max_completion_length)
        for name, value in (longest, ("samples", self.samples), ("rounds", self.rounds)):
            if value < 1:
                raise UserError(f"--{name} is {value}, but must be at least 1")
        if not self.rows or min(self.rows) < 1:
            raise UserError("--rows names no number of rows of at least 1: write it as --rows 4,8,16")
        for rows in self.rows:
            if rows > _MOST_ROWS:
                raise UserError(f"--rows {rows}: at most {_MOST_ROWS} are decoded together")
            if rows % self.samples:
                raise UserError(
                    f"--rows {rows} is no multiple of --samples {self.samples}, the completions of each prompt: choose "
                    "a multiple, or fewer samples"
                )
        for length in self.lengths:
            try:
                FixedLength(length)
            except ValueError as error:
                raise UserError(f"--lengths: {error}") from None
        if not any(self.lengths):
            raise UserError("--lengths names no length above 0, and plain decoding is measured anyway: give 1 to 8")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}, but must be at least 0, which is greedy, and finite")
        for option, value in (("--top-p", self.top_p), ("--min-p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise UserError(
                    f"{option} is {value}, but must be above 0 and at most 1; leave it out to keep everything"
                )
        if not 0 < self.minutes < math.inf:
            raise UserError(
                f"--minutes is {self.minutes}, but a draft needs some time to learn: give a finite number above 0"
            )
        for name in self.verifiers:
            make_verifier(name)
            if VERIFIER_KINDS[name].greedy_only and self.temperature > 0:
                raise UserError(
                    f"the verifier {name!r} keeps only the likeliest tokens, which is not lossless at temperature "
                    f"{self.temperature}: add --temperature 0, or leave it out of --verifiers"
                )

    @property
    def rules(self) -> dict[str, AbstractVerifier]:
        """The verifiers, by name."""
        by_default = "block" if self.temperature else "greedy"
        return {name: make_verifier(name) for name in self.verifiers or (by_default,)}

    @property
    def drafted(self) -> tuple[int, ...]:
        """The lengths, without 0."""
        return tuple(sorted(length for length in self.lengths if length))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object."""
        return {
            **{name: self.__dict__[name] for name in self.__dataclass_fields__},
            "lengths": [0, *self.drafted],
            "verifiers": list(self.rules),
        }


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """From `"4,8,16"`.

    **Raises:**

    `UserError` that names the option.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"{option} {text}: write whole numbers with commas between them, as in {option} 1,2,4"
        ) from None
