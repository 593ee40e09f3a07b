"""A run's folder as the report reads it: whatever is there, also while the run goes on."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from .._speculation import Comparison


@dataclass(frozen=True)
class RunStory:
    """What the files of a run's folder say.

    **Arguments:**

    - `name`: the folder's name.
    - `folder`: its absolute path.
    - `config`: the configuration, by dotted key; empty where `config.toml` can't be read.
    - `metrics`: the objects of `metrics.jsonl` and, of a run that evaluates, of `eval.jsonl`, in the order of steps.
    - `completions`: those of `completions.jsonl`.
    - `machines`, `times`: those of `machine.jsonl` and `times.jsonl`, one a start.
    - `comparison`: against plain decoding, if it was measured.
    - `unreadable`: by file, how many lines of it are no JSON objects; the last line of a run that goes on is one.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    machines: list[dict[str, Any]]
    times: list[dict[str, Any]]
    comparison: Comparison | None
    unreadable: dict[str, int]


def read_run(folder: Path) -> RunStory:
    """Reads a run's folder. Only `metrics.jsonl` has to be there, with one step at least.

    **Raises:**

    `UserError` if there are no steps to report of.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"there is no run in {folder}, for it has no metrics.jsonl: name the folder of a run (--out)")
    unreadable: dict[str, int] = {}

    def records(name: str, key: str = "step") -> list[dict[str, Any]]:
        found, unreadable[name] = _readable(folder / name)
        kept = [record for record in found if isinstance(record.get(key), int)]
        # Folders of earlier versions count from 0.
        first = 1 if name != "eval.jsonl" and kept and kept[0][key] == 0 else 0
        return [record | {key: record[key] + first} for record in kept]

    metrics = records("metrics.jsonl")
    if not metrics:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no steps yet: let the run do at least one")
    return RunStory(
        name=folder.resolve().name,
        folder=folder.resolve(),
        config=_config(folder / "config.toml"),
        metrics=sorted([*metrics, *records("eval.jsonl")], key=lambda record: record["step"]),
        completions=records("completions.jsonl"),
        machines=records("machine.jsonl", "from_step"),
        times=records("times.jsonl", "from_step"),
        comparison=_comparison(folder / "comparison.json"),
        unreadable={name: count for name, count in unreadable.items() if count},
    )


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of tables as one, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _readable(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are JSON objects, and how many are not. No file is no lines."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    found, broken = [], 0
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            broken += 1
    return found, broken


def _config(path: Path) -> dict[str, Any]:
    try:
        return flattened(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}  # the curves can be told without it


def _comparison(path: Path) -> Comparison | None:
    try:
        return Comparison(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
