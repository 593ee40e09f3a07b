"""From a row of a table, a dictionary of columns, to a prompt with what its rewards need."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import numpy as np

from .._types import Message
from ..errors import UserError, did_you_mean
from ._base import Example
from ._rewards import RESERVED_COLUMNS


class RowLayout(eqx.Module):
    """How rows are read: TRL's convention, after renaming columns and filling in a template.

    `prompt` is text or a list of messages, every other column goes to the rewards by name.

    **Arguments:**

    - `columns`: old name to new name.
    - `prompt_template`: makes `prompt` of the columns, whose names stand in braces; `None`: there is a column `prompt`.
    - `chat`: whether a prompt that is text becomes one user message.
    """

    columns: Mapping[str, str]
    prompt_template: str | None
    chat: bool

    def example(self, row: Any, where: str) -> Example:
        """The prompt and the columns of a row.

        **Arguments:**

        - `row`: a dictionary by the columns' old names.
        - `where`: its place, for messages: "problems.csv, line 3".

        **Raises:**

        `UserError` if the row is none, has no prompt, or a column that cannot be.
        """
        if not isinstance(row, Mapping):
            raise UserError(f'{where}: {kind_of(row)}, but each must be an object such as {{"prompt": "..."}}')
        row = self._renamed(row, where)
        if self.prompt_template is not None:
            row["prompt"] = _filled(self.prompt_template, row, where)
        if "prompt" not in row:
            found = ", ".join(repr(name) for name in row) or "nothing"
            raise UserError(
                f"{where}: no `prompt`, only {found}. Add or rename a column: "
                f'task.columns = {{{next(iter(row), "question")} = "prompt"}}, or write a task.prompt_template'
            )
        for name in RESERVED_COLUMNS:
            if name in row:
                raise UserError(
                    f"{where}: the column {name!r} has a name that rewards need for something else. Rename it."
                )
        prompt = _plain_prompt(row.pop("prompt"))
        check_prompt(prompt, where)
        if self.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return Example(prompt, row)

    def _renamed(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        for old in self.columns:
            if old not in row:
                raise UserError(
                    f"{where}: task.columns renames {old!r}, but the columns are {_listed(row)}."
                    f"{did_you_mean(old, map(str, row))}"
                )
        names = [self.columns.get(name, name) for name in row]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{where}: task.columns makes two columns called {name!r}: give one another name")
        return dict(zip(names, row.values(), strict=True))


# A name in braces; doubled braces stand for themselves.
_PLACE = re.compile(r"\{\{(\w+)\}\}|\{([A-Za-z_]\w*)\}")


def _filled(template: str, row: Mapping[str, Any], where: str) -> str:
    def value(found: re.Match[str]) -> str:
        literal, name = found.groups()
        if literal is not None:
            return f"{{{literal}}}"
        if name not in row:
            raise UserError(
                f"{where}: task.prompt_template names {{{name}}}, but the columns are {_listed(row)}."
                f"{did_you_mean(name, map(str, row))} (Braces that are to stay are doubled: {{{{{name}}}}}.)"
            )
        if row[name] is None:
            raise UserError(f"{where}: the column {name!r}, which task.prompt_template names, is empty there")
        return str(row[name])

    return _PLACE.sub(value, template)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _plain_prompt(prompt: Any) -> Any:
    """Lists as Arrow and NumPy have them, and messages without the fields that only other messages have."""
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if not isinstance(prompt, list):
        return prompt
    return [_plain_message(message) if isinstance(message, Mapping) else message for message in prompt]


def _plain_message(message: Mapping[str, Any]) -> Message:
    return {key: value for key, value in message.items() if value is not None or key in ("role", "content")}


def check_prompt(prompt: Any, where: str) -> None:
    """Raises `UserError` if this is neither text nor a list of messages, or holds half of a character."""
    if not isinstance(prompt, str | list):
        raise UserError(f"{where}: `prompt` is {kind_of(prompt)}, but must be text or a list of messages")
    if not prompt:
        raise UserError(f"{where}: `prompt` is empty. Give it some text, or delete the line.")
    if isinstance(prompt, str):
        _check_text(prompt, f"{where}: `prompt`")
        return
    for position, message in enumerate(prompt):
        _check_message(message, position, where)


def _check_message(message: Any, position: int, where: str) -> None:
    example = '{"role": "user", "content": "..."}'
    if not isinstance(message, dict):
        raise UserError(f"{where}: message {position} of `prompt` is {kind_of(message)}, but must be like {example}")
    for key in ("role", "content"):
        if key not in message:
            raise UserError(f"{where}: message {position} of `prompt` has no {key!r}; it must be like {example}")
        if not isinstance(message[key], str):
            raise UserError(
                f"{where}: the {key!r} of message {position} of `prompt` is {kind_of(message[key])}, not text"
            )
        _check_text(message[key], f"{where}: the {key!r} of message {position} of `prompt`")


def _check_text(text: str, what: str) -> None:
    """JSON can hold half of a character (a lone surrogate), which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise UserError(
            f"{what} holds half of a character, {half}, at its character {error.start + 1}: text that was cut in the "
            "middle of an emoji, say. Take it out, or put the whole character there"
        ) from error


def kind_of(value: Any) -> str:
    """What a value read from a file is, in words."""
    names: Sequence[tuple[type, str]] = (
        (str, "text"),
        (bool, "a boolean"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
        (dict, "an object"),
        (type(None), "null"),
    )
    return next((words for kind, words in names if isinstance(value, kind)), f"a value of type {type(value).__name__}")
