"""Completions as a table, from their records."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ._base import Table

MOST_ROWS = 64  # of a step; completions.jsonl has all of them


def completion_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The first completions of a step, which are whole groups unless a group is larger than the table.

    **Arguments:**

    - `records`: of one step, as `completions.jsonl` has them.
    """
    shown = records[:MOST_ROWS]
    names = dict.fromkeys(["step", *(key for record in shown for key in record)])
    return Table(tuple(names), [tuple(_cell(record.get(name)) for name in names) for record in shown])


def _cell(value: Any) -> str | float | int | bool | None:
    match value:
        case None | str() | bool() | int() | float():
            return value
        case list() if value and all(isinstance(part, Mapping) and "content" in part for part in value):
            return "\n".join(f"{part.get('role', '')}: {part['content']}" for part in value)  # a prompt of messages
        case _:
            return json.dumps(value, ensure_ascii=False, default=str)
