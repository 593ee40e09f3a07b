"""What a run's folder says of evaluations, and of the best policy so far."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import json_line
from ._folder import replace_file
from ._record_lines import read_records


class EvaluationRecords:
    """The records of evaluations in a run's folder, which its `RunFolder` holds.

    - `eval.jsonl`: one object an evaluation, with the `step` after which it was; 0 is before the first.
    - `eval_completions.jsonl`: one object a completion of it, with the same `step`.
    - `best.json`: which policy is in `best/`: its `step`, the `metric` and its `value`.

    An evaluation is in `eval.jsonl` once everything else of it is written, so what is there is whole.

    **Arguments:**

    - `folder`: the run's.
    """

    folder: Path

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def best_path(self) -> Path:
        """Of the best policy."""
        return self.folder / "best"

    def read(self) -> list[dict[str, Any]]:
        """The objects of `eval.jsonl`."""
        return _read(self._metrics)

    def append(self, metrics: Mapping[str, Any], completions: Iterable[Mapping[str, Any]]) -> None:
        """Adds an evaluation.

        **Arguments:**

        - `metrics`: with the `step`.
        - `completions`: without it.
        """
        step = {"step": metrics["step"]}
        _append(self._completions, [step | dict(completion) | step for completion in completions])
        _append(self._metrics, [metrics])

    def rewind(self, done: int) -> None:
        """Drops what comes after so many steps, and what a kill has cut off: a run resumed from there does it again."""
        kept = {record["step"] for record in self.read() if record["step"] <= done}
        self._keep(self._metrics, kept)
        self._keep(self._completions, kept)

    def best(self) -> dict[str, Any] | None:
        """What `best.json` says; `None` without one."""
        try:
            return json.loads((self.folder / "best.json").read_bytes())
        except (OSError, ValueError):
            return None

    def write_best(self, step: int, metric: str, value: float) -> None:
        """Writes `best.json`."""
        best = {"step": step, "metric": metric, "value": value}
        replace_file(self.folder / "best.json", (json_line(best) + "\n").encode())

    @property
    def _metrics(self) -> Path:
        return self.folder / "eval.jsonl"

    @property
    def _completions(self) -> Path:
        return self.folder / "eval_completions.jsonl"

    def _keep(self, path: Path, steps: set[int]) -> None:
        if path.exists():
            lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is nothing, or half a line
            kept = [line for line, record in zip(lines, _read(path), strict=True) if record["step"] in steps]
            replace_file(path, b"".join(line + b"\n" for line in kept))


def _read(path: Path) -> list[dict[str, Any]]:
    records = read_records(path) if path.exists() else []
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("step"), int):
            raise UserError(f"line {number} of {path} has no step: remove it")
    return records


def _append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json_line(record) + "\n" for record in records)
    try:
        with open(path, "ab") as file:
            file.write(text.encode("utf-8", "replace"))  # half of a character, of a completion that broke off in it
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror}; make room there, then run again with --resume"
        ) from error
