"""Tasks of what a script hands over."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ..choices import Options, options_of
from ..errors import UserError
from ._base import AbstractTask
from ._rows import RowLayout
from ._table import Columns, Limit, Rows, Table, digest_of_rows, rows_task, table_task


def given_task(rows: Any, seed: int, options: Mapping[str, Any], name: str) -> AbstractTask:
    """Makes a task of an object that a script hands over.

    **Arguments:**

    - `rows`: a task; a sequence of dictionaries; or an object with rows by number, such as a `datasets.Dataset`.
    - `seed`: seed of the order; a task has its own.
    - `options`: the keys of `[task]` besides its name, as TOML has them.
    - `name`: name of the task in messages.

    **Raises:**

    `UserError` if it is none of these, is empty, or has a row that is no prompt.
    """
    if isinstance(rows, AbstractTask):
        if options:
            raise UserError(f"task.{next(iter(options))} is an option, but {name} is a task already: drop one of them")
        return rows
    return _rows_task(rows, name, seed, **given_options(name).read(options))


def given_options(name: str) -> Options:
    """The options that rows handed over by a script have."""
    return options_of(_rows_task, name, "task.", given=("seed",), first=2)


def _rows_task(
    rows: Any,
    name: str,
    seed: int,
    *,
    columns: Columns | None = None,
    prompt_template: str | None = None,
    chat: bool = False,
    limit: Limit | None = None,
) -> AbstractTask:
    """**Arguments:**

    - `columns`: names to change, old to new; `prompt` is the prompt, all others go to the rewards.
    - `prompt_template`: text that becomes the prompt, with names of columns in braces.
    - `chat`: whether a prompt that is text becomes one user message.
    - `limit`: only so many rows, from the first on.
    """
    layout = RowLayout(columns or {}, prompt_template, chat)
    if isinstance(rows, Mapping):
        raise UserError(
            f"task is a {type(rows).__name__} with {', '.join(map(repr, rows)) or 'nothing in it'}: of several splits "
            "hand over one, as in task=dataset['train']; of columns, a list of one dictionary a row"
        )
    if isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        if not rows:
            raise UserError('task has no rows: hand over at least one, such as {"prompt": "..."}')
        table = Table(rows, lambda number: f"row {number} of task", digest_of_rows(rows))
        return table_task(table, seed, layout, limit)
    if _gives_rows(rows):
        return rows_task(rows, name, seed, layout, limit)
    raise UserError(
        f"task is of type {type(rows).__name__}: hand over a sequence of dictionaries, a datasets.Dataset, a task, or "
        "a name as in task.name. Of a stream take a part: task=list(stream.take(1000))"
    )


def _gives_rows(rows: Any) -> TypeGuard[Rows]:
    return not isinstance(rows, str | bytes) and isinstance(rows, Rows)
