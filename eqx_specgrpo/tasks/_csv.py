"""Tasks from a file of comma-separated values."""

import csv
import functools as ft
import io
from pathlib import Path

from ..errors import UserError
from ._kind import TaskKind
from ._table import Table, digest_of_bytes, file_task, named_by_suffix


def read_csv(path: Path) -> Table:
    """The rows of a file in UTF-8 whose first line names the columns. Every value is text."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, lines, names = [], [], None
    try:
        for values in reader:
            if not values:
                continue
            if names is None:
                names = _checked_names(values, path)
                continue
            if len(values) != len(names):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {len(names)} columns "
                    f"({', '.join(names)}): put text with commas or line breaks into double quotes"
                )
            rows.append(dict(zip(names, values, strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: not comma-separated values ({error}): a quote inside quoted text is "
            "written twice; very long texts are better kept as .jsonl or .parquet"
        ) from error
    return Table(rows, lambda row: f"{path}, line {lines[row]}", digest_of_bytes(data))


def _checked_names(names: list[str], path: Path) -> list[str]:
    for name in names:
        if not name or names.count(name) > 1:
            what = f"names the column {name!r} {names.count(name)} times" if name else "has a column without a name"
            raise UserError(f"{path}: its first line, which names the columns, {what}: {', '.join(names)}")
    return names


TASK = TaskKind(ft.partial(file_task, read_csv), named_by_suffix(".csv"), is_file=True)
