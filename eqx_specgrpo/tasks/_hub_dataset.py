"""Tasks from a dataset by its name, which `datasets` downloads."""

import re
from pathlib import Path

from ..errors import UserError
from ._kind import TaskKind
from ._rows import RowLayout
from ._saved_dataset import dataset_library, one_split
from ._table import Columns, Limit, TableTask, rows_task

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def hub_dataset_task(
    path: str,
    seed: int = 0,
    *,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    columns: Columns | None = None,
    prompt_template: str | None = None,
    chat: bool = False,
    limit: Limit | None = None,
) -> TableTask:
    """A task of the rows of a dataset by its name, downloaded or found in the cache of `datasets` (extra `datasets`).

    **Arguments:**

    - `path`: `org/name`.
    - `seed`: of the order.
    - `split`: such as "train", or as `datasets` slices them, "train[:1000]".
    - `subset`: of a dataset that comes in several, such as "main".
    - `revision`: branch, tag or commit of the dataset.
    - `columns`: names to change, old to new; `prompt` is the prompt, all others go to the rewards.
    - `prompt_template`: text that becomes the prompt, with names of columns in braces.
    - `chat`: whether a prompt that is text becomes one user message.
    - `limit`: only so many rows, from the first on.

    **Raises:**

    `UserError` if it can't be had, or has a row that is no prompt.
    """
    library = dataset_library()
    try:
        # Slices are the library's to understand; without a split it gives all of them.
        found = library.load_dataset(path, name=subset, split=split, revision=revision)
    except Exception as error:  # whatever the network stack throws, the advice is the same
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"there is no folder {path!r} here, and loading the dataset {path!r} failed: {reason}. Check the name, "
            "task.subset, task.split and the network, or give a file or a folder that was saved elsewhere"
        ) from error
    rows = one_split(found, None, path)
    return rows_task(rows, f"the dataset {path}", seed, RowLayout(columns or {}, prompt_template, chat), limit)


def _hub_name(name: str) -> tuple[str, ...] | None:
    """`org/name`, where there is no folder of that name."""
    return (name,) if _NAME.fullmatch(name) and not Path(name).exists() else None


TASK = TaskKind(hub_dataset_task, _hub_name)
