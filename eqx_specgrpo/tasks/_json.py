"""Tasks from a file that is one JSON list of objects."""

import functools as ft
import json
from pathlib import Path

from ..errors import UserError
from ._jsonl import read_jsonl
from ._kind import TaskKind
from ._rows import kind_of
from ._table import Table, digest_of_bytes, file_task, named_by_suffix


def read_json(path: Path) -> Table:
    """The objects of a JSON list, in UTF-8. A file of one object a line, which `datasets` calls `.json` as well, is
    read as such."""
    data = path.read_bytes()
    text = data.removeprefix(b"\xef\xbb\xbf")
    if text.lstrip()[:1] == b"{":
        return read_jsonl(path)
    if not text.strip():
        return Table([], str, digest_of_bytes(data))
    try:
        rows = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg} in line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise UserError(f"{path}: JSON nested too deeply. It must be a list of objects.") from error
    except ValueError as error:
        raise UserError(f"{path}: a number of too many digits for Python ({error}). Write it as text.") from error
    if not isinstance(rows, list):
        raise UserError(f'{path}: {kind_of(rows)}, but it must be a list of objects such as {{"prompt": "..."}}')
    return Table(rows, lambda row: f"{path}, item {row}", digest_of_bytes(data))


TASK = TaskKind(ft.partial(file_task, read_json), named_by_suffix(".json"), is_file=True)
