"""Tasks from a file: one JSON object a line."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import user_path
from ._base import AbstractTask, Example, check_index
from ._kind import TaskKind
from ._rewards import RESERVED_COLUMNS


class JsonlTask(AbstractTask):
    """The lines of a file in TRL's convention: `prompt` is text or a list of messages, all else goes to the rewards.

    Blank lines are skipped. A column that a line doesn't have is `None` there.
    """

    seed: int
    size: int | None
    path: Path
    digest: str
    examples: tuple[Example, ...]

    def __init__(self, path: str | Path, seed: int = 0):
        """**Arguments:**

        - `path`: a file of JSON objects, one a line, in UTF-8.
        - `seed`: of the order.
        """
        path = user_path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"the task file {path} can't be read: {error.strerror or error}. Check the path."
            ) from error
        rows = []
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if line.strip():
                rows.append(_parse_line(line, f"{path}, line {number}"))
        if not rows:
            raise UserError(f"the task file {path} is empty: put one JSON object with a `prompt` on each line")
        names = list(dict.fromkeys(name for row in rows for name in row if name != "prompt"))
        self.seed = seed
        self.size = len(rows)
        self.path = path
        self.digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.examples = tuple(Example(row["prompt"], {name: row.get(name) for name in names}) for row in rows)

    def example(self, index: int) -> Example:
        check_index(index, self.size)
        return self.examples[index]

    def fingerprint(self) -> str:
        return self.digest


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno}). Each line must be one whole JSON object."
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply. Each line must be one JSON object.") from error
    except ValueError as error:
        raise UserError(f"{where}: a number of too many digits for Python ({error}). Write it as text.") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: {_kind(row)}, but each line must be an object such as {{"prompt": "..."}}')
    if "prompt" not in row:
        found = ", ".join(repr(name) for name in row) or "nothing"
        raise UserError(f"{where}: no `prompt`, only {found}. Add or rename a column.")
    for name in RESERVED_COLUMNS:
        if name in row:
            raise UserError(f"{where}: the column {name!r} has a name that rewards need for something else. Rename it.")
    _check_prompt(row["prompt"], where)
    return row


def _check_prompt(prompt: Any, where: str) -> None:
    if not isinstance(prompt, str | list):
        raise UserError(f"{where}: `prompt` is {_kind(prompt)}, but must be text or a list of messages")
    if not prompt:
        raise UserError(f"{where}: `prompt` is empty. Give it some text, or delete the line.")
    if isinstance(prompt, str):
        _check_text(prompt, f"{where}: `prompt`")
        return
    for position, message in enumerate(prompt):
        example = '{"role": "user", "content": "..."}'
        if not isinstance(message, dict):
            raise UserError(f"{where}: message {position} of `prompt` is {_kind(message)}, but must be like {example}")
        for key in ("role", "content"):
            if key not in message:
                raise UserError(f"{where}: message {position} of `prompt` has no {key!r}; it must be like {example}")
            if not isinstance(message[key], str):
                raise UserError(
                    f"{where}: the {key!r} of message {position} of `prompt` is {_kind(message[key])}, not text"
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


def _kind(value: Any) -> str:
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


TASK = TaskKind(JsonlTask, lambda name: (name,) if name.endswith(".jsonl") else None, is_file=True)
