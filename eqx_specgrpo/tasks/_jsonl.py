"""Tasks from a file: one JSON object a line."""

import functools as ft
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._kind import TaskKind
from ._rows import kind_of
from ._table import Table, digest_of_bytes, file_task, named_by_suffix


def read_jsonl(path: Path) -> Table:
    """The lines of a file of JSON objects, in UTF-8. Blank lines are skipped."""
    data = path.read_bytes()
    rows, lines = [], []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            rows.append(_parse_line(line, f"{path}, line {number}"))
            lines.append(number)
    return Table(rows, lambda row: f"{path}, line {lines[row]}", digest_of_bytes(data))


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
        raise UserError(f'{where}: {kind_of(row)}, but each line must be an object such as {{"prompt": "..."}}')
    return row


TASK = TaskKind(ft.partial(file_task, read_jsonl), named_by_suffix(".jsonl"), is_file=True)
