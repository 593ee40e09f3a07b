"""Tasks from a folder that `datasets` has saved, and what the library is used for here."""

import functools as ft
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean
from ..files import user_path
from ._kind import TaskKind
from ._rows import RowLayout
from ._table import Columns, Limit, Rows, TableTask, rows_task


def saved_dataset_task(
    path: str | Path,
    seed: int = 0,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    prompt_template: str | None = None,
    chat: bool = False,
    limit: Limit | None = None,
) -> TableTask:
    """A task of the rows of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written (extra
    `datasets`).

    **Arguments:**

    - `path`: of the folder.
    - `seed`: of the order.
    - `split`: of a folder of several, such as "train".
    - `columns`: names to change, old to new; `prompt` is the prompt, all others go to the rewards.
    - `prompt_template`: text that becomes the prompt, with names of columns in braces.
    - `chat`: whether a prompt that is text becomes one user message.
    - `limit`: only so many rows, from the first on.

    **Raises:**

    `UserError` if there is no such dataset or split, or it has a row that is no prompt.
    """
    path = user_path(path)
    library = dataset_library()
    if not path.is_dir():
        raise UserError(f"the task {path} is no folder: name one that Dataset.save_to_disk has written")
    try:
        found = library.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(
            f"the folder {path} holds no dataset: name one that Dataset.save_to_disk has written, or a file "
            "(.jsonl, .json, .csv, .parquet)"
        ) from error
    except IndexError as error:  # how the library says that there is no file of rows
        raise UserError(
            f"the dataset in {path} has no rows, or a split of it has none: save it with at least one row in each"
        ) from error
    except Exception as error:  # whatever reading Arrow files raises
        raise UserError(f"the dataset in {path} can't be read: {type(error).__name__}: {_first_line(error)}") from error
    rows = one_split(found, split, str(path))
    return rows_task(rows, f"the dataset {path}", seed, RowLayout(columns or {}, prompt_template, chat), limit)


def one_split(found: Any, split: str | None, name: str) -> Rows:
    """The rows of a split, of a dataset that has been loaded.

    **Raises:**

    `UserError` if there is no such split, or none was named and there are several.
    """
    if isinstance(found, Mapping):
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            asked = "say which with task.split" if split is None else f"there is no {split!r}.{_similar(split, found)}"
            raise UserError(f"the dataset {name} has the splits {', '.join(map(str, found))}: {asked}")
        return found[split]
    if split is not None:
        raise UserError(f"task.split = {split!r}, but the dataset {name} has no splits: leave it out")
    return found


def _similar(split: str, found: Mapping[str, Any]) -> str:
    hint = did_you_mean(split, found)
    return hint if hint.startswith(" Did") else ""


def dataset_library() -> Any:
    """The package `datasets`.

    **Raises:**

    `UserError` if it isn't installed.
    """
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise UserError(
            "datasets in folders and on the hub need a package that isn't installed "
            f"({error.name}): pip install 'eqx_specgrpo[datasets]'"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _named_folder(exists: Callable[[Path], bool], name: str) -> tuple[str, ...] | None:
    """A name that ends with a slash, or is a folder that is there."""
    return (name,) if name.endswith("/") or (name and exists(user_path(name))) else None


TASK = TaskKind(saved_dataset_task, ft.partial(_named_folder, Path.is_dir), is_file=True)
