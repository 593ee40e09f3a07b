"""Tasks of rows: of a file, of a dataset, or of what a script has made."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, overload, runtime_checkable

from pydantic import Field

from ..errors import Stopped, UserError
from ..files import user_path
from ._base import AbstractTask, Example, check_index
from ._rows import RowLayout

Columns = dict[str, str]
Limit = Annotated[int, Field(ge=1)]
# Of what is not read as a whole, so many items tell another version of it.
_FINGERPRINTED = 1024


class Table(NamedTuple):
    """Rows that are in memory.

    **Arguments:**

    - `rows`: one dictionary a row.
    - `place`: what to call a row in messages, by its number from 0.
    - `digest`: changes when a row does.
    """

    rows: Sequence[Any]
    place: Callable[[int], str]
    digest: str


@runtime_checkable
class Rows(Protocol):
    """The interface of rows that are read by number when they are needed, such as those of a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class TableTask(AbstractTask):
    """A task of rows in TRL's convention: `prompt` is text or a list of messages; the rewards get other columns by
    name."""

    seed: int
    size: int | None
    examples: Sequence[Example]
    digest: str

    def __init__(self, examples: Sequence[Example], digest: str, seed: int = 0):
        """**Arguments:**

        - `examples`: one a row.
        - `digest`: changes when a row does.
        - `seed`: of the order.
        """
        self.seed = seed
        self.size = len(examples)
        self.examples = examples
        self.digest = digest

    def example(self, index: int) -> Example:
        check_index(index, self.size)
        return self.examples[index]

    def fingerprint(self) -> str:
        return self.digest


def table_task(table: Table, seed: int, layout: RowLayout, limit: int | None) -> TableTask:
    """All rows of a table, each of them checked. A column that a row doesn't have is `None` there."""
    count = len(table.rows) if limit is None else min(limit, len(table.rows))
    found = [layout.example(table.rows[number], table.place(number)) for number in range(count)]
    names = list(dict.fromkeys(name for example in found for name in example.columns))
    examples = tuple(Example(example.prompt, {name: example.columns.get(name) for name in names}) for example in found)
    return TableTask(examples, table.digest, seed)


def rows_task(rows: Rows, what: str, seed: int, layout: RowLayout, limit: int | None) -> TableTask:
    """Rows that are read when they are asked for. The first, and up to 1,024 others, are checked at once.

    **Arguments:**

    - `what`: what to call them in messages.
    """
    if len(rows) == 0:
        raise UserError(f"{what} is empty: it needs at least one row, with a `prompt`")
    examples = _Examples(rows, what, layout, len(rows) if limit is None else min(limit, len(rows)))
    digest = hashlib.blake2b(f"{len(examples)}".encode(), digest_size=16)
    for number in evenly_spread(len(examples), _FINGERPRINTED):
        digest.update(as_digested(examples.row(number)))
        _ = examples[number]
    return TableTask(examples, digest.hexdigest(), seed)


def file_task(
    read: Callable[[Path], Table],
    path: str | Path,
    seed: int = 0,
    *,
    columns: Columns | None = None,
    prompt_template: str | None = None,
    chat: bool = False,
    limit: Limit | None = None,
) -> TableTask:
    """A task of the rows of a file.

    **Arguments:**

    - `read`: the rows of a file of this kind.
    - `path`: of the file.
    - `seed`: of the order.
    - `columns`: names to change, old to new; `prompt` is the prompt, all others go to the rewards.
    - `prompt_template`: text that becomes the prompt, with names of columns in braces.
    - `chat`: whether a prompt that is text becomes one user message.
    - `limit`: only so many rows, from the first on.

    **Raises:**

    `UserError` if the file can't be read, is empty, or has a row that is no prompt.
    """
    path = user_path(path)
    try:
        table = read(path)
    except OSError as error:
        raise UserError(f"the task file {path} can't be read: {error.strerror or error}. Check the path.") from error
    if not table.rows:
        raise UserError(f"the task file {path} is empty: it needs at least one row, with a `prompt`")
    return table_task(table, seed, RowLayout(columns or {}, prompt_template, chat), limit)


def named_by_suffix(suffix: str) -> Callable[[str], tuple[str, ...] | None]:
    """For a kind of file: the name is a path that ends so."""
    return lambda name: (name,) if name.endswith(suffix) else None


def digest_of_bytes(data: bytes) -> str:
    """Of a file that is in memory as a whole."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of_rows(rows: Sequence[Any]) -> str:
    """Of all rows."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(as_digested(row))
    return digest.hexdigest()


def as_digested(row: Any) -> bytes:
    """A row as bytes that are the same in another process: what JSON cannot hold is told by its text."""
    try:
        text = json.dumps(row, default=str, sort_keys=True)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, or a row that holds itself
        text = repr(row)
    return text.encode("utf-8", "replace")


def evenly_spread(size: int, most: int) -> list[int]:
    """So many of the numbers below `size`, the first and the last among them."""
    if size <= most:
        return list(range(size))
    return [number * (size - 1) // (most - 1) for number in range(most)]


class _Examples(Sequence[Example]):
    """Examples that are made when they are asked for."""

    def __init__(self, rows: Rows, what: str, layout: RowLayout, size: int):
        self._rows, self._what, self._layout, self._size = rows, what, layout, size

    def __len__(self) -> int:
        return self._size

    def row(self, number: int) -> Mapping[str, Any]:
        """A row as it is stored."""
        try:
            return self._rows[number]
        except Stopped:
            raise
        except Exception as error:  # whatever made it: a table that is read by column, for one
            raise UserError(
                f"row {number} of {self._what} could not be read: {type(error).__name__}: {error}. It must give rows "
                "by number, each a dictionary of its columns (of a pandas frame: frame.to_dict('records'))"
            ) from error

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._size))]
        check_index(index, self._size)
        return self._layout.example(self.row(index), f"{self._what}, row {index}")

    def __iter__(self) -> Iterator[Example]:
        return (self[number] for number in range(self._size))
