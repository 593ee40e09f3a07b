"""Tasks from a parquet file."""

import functools as ft
import hashlib
import importlib
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._kind import TaskKind
from ._table import Table, file_task, named_by_suffix


def read_parquet(path: Path) -> Table:
    """The rows of a parquet file (extra `data`)."""
    arrow, parquet = _library("pyarrow"), _library("pyarrow.parquet")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    try:
        rows = parquet.read_table(path).to_pylist()
    except arrow.ArrowException as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the task file {path} is no parquet file that can be read: {reason}. Was it copied as a whole? (Of a "
            "repository's large files there may be only a pointer.)"
        ) from error
    return Table(rows, lambda row: f"{path}, row {row}", digest)


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"parquet files need a package that isn't installed ({error.name}): pip install 'eqx_specgrpo[data]'"
        ) from error


TASK = TaskKind(ft.partial(file_task, read_parquet), named_by_suffix(".parquet"), is_file=True)
