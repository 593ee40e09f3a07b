"""The lines of a run's records, as any version of this library wrote them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError


def read_steps(path: Path | str) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl` or `completions.jsonl`, with steps counted from 1, whichever version wrote it.

    **Arguments:**

    - `path`: of the file.

    **Returns:**

    One dictionary per line.

    **Raises:**

    `UserError` as [`eqx_specgrpo.records.read_records`][] does.
    """
    return counted_from_one(read_records(path))


def counted_from_one(records: list[dict[str, Any]], key: str = "step") -> list[dict[str, Any]]:
    """Records as they are written now: older ones begin with step 0."""
    if not records or records[0].get(key) != 0:
        return records
    return [record | {key: record[key] + 1} for record in records]


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl` or `completions.jsonl`. A last line that is half written is left out.

    **Arguments:**

    - `path`: of the file.

    **Returns:**

    One dictionary per line.

    **Raises:**

    `UserError` if the file is missing, or has a line that is no JSON object.
    """
    return [record for _, _, record in records_of(Path(path))]


def records_of(path: Path) -> list[tuple[int, bytes, dict[str, Any]]]:
    try:
        *lines, _ = path.read_bytes().split(b"\n")  # What follows the last newline is nothing, or half a line.
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; is it the folder of a run?") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"line {number} of {path} is not a JSON object: remove it")
        records.append((number, line, record))
    return records


def step_of(path: Path, number: int, record: Mapping[str, Any], name: str = "step") -> int:
    step = record.get(name)
    if not isinstance(step, int):
        raise UserError(f"line {number} of {path} has no {name}: remove it")
    return step


def starts_of(path: Path, done: int) -> list[dict[str, Any]]:
    """The records of the starts that the first `done` steps are of: what came of the others is done again."""
    starts = records_of(path) if path.exists() else []
    for number, _, start in starts:
        step_of(path, number, start, "from_step")
    anew = counted_from_one([start for _, _, start in starts], "from_step")
    return [start for start in anew if start["from_step"] <= done]
