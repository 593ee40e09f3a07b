"""What a run's folder has, for those that read there and for the one that writes."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._record_lines import read_records, starts_of


class AbstractRunFolder(ABC):
    """A run's folder.

    - `config.toml`: the resolved configuration.
    - `metrics.jsonl`: one object a step, with its `step`, counted from 1.
    - `completions.jsonl`: one object a completion, with its `step`.
    - `machine.jsonl`: one object a start, of what the steps from `from_step` on were computed on.
    - `inputs.jsonl`: one object a start, of what they were computed from: fingerprints by name.
    - `times.jsonl`: one object a start, of where its wall-clock time went.
    - `comparison.json`: what was measured against plain decoding at the end.
    - `trackers.json`: what trackers need to go on; some write in folders of their own names.
    - `eval.jsonl`, `eval_completions.jsonl`, `best.json`: see [`EvaluationRecords`][].
    - `checkpoints/`, `policy/`, `draft/`: written by others.

    Older folders count steps from 0. They are counted anew when a run goes on there.

    **Arguments:**

    - `path`: the folder.
    """

    path: Path

    def __init__(self, path: Path):
        self.path = path

    @property
    def config_path(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def completions_path(self) -> Path:
        return self.path / "completions.jsonl"

    @property
    def machine_path(self) -> Path:
        return self.path / "machine.jsonl"

    @property
    def inputs_path(self) -> Path:
        return self.path / "inputs.jsonl"

    @property
    def times_path(self) -> Path:
        return self.path / "times.jsonl"

    @property
    def comparison_path(self) -> Path:
        return self.path / "comparison.json"

    @property
    def policy_path(self) -> Path:
        return self.path / "policy"

    @property
    def draft_path(self) -> Path:
        return self.path / "draft"

    @abstractmethod
    def write_config(self, text: str) -> None:
        """Writes `config.toml`, aside and renamed."""

    @abstractmethod
    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`. JSON has no NaN and no infinity: both become `null`."""

    @abstractmethod
    def write_machine(self, done: int, machine: Mapping[str, Any]) -> None:
        """Says in `machine.jsonl` what the steps after `done` of them are computed on. Starts whose steps are all done
        again are forgotten."""

    def read_machine(self, done: int) -> dict[str, Any] | None:
        """What the first `done` steps were computed on, the last of it if it changed; `None` if nothing says so."""
        kept = starts_of(self.machine_path, done)
        return kept[-1] if kept else None

    @abstractmethod
    def write_inputs(self, done: int, inputs: Mapping[str, Any]) -> None:
        """Says in `inputs.jsonl` what the steps after `done` of them are computed from, in the same way."""

    def read_inputs(self, done: int) -> dict[str, dict[str, Any]] | None:
        """What the first `done` steps were computed from, the last of them if it changed; `None` if nothing says so.

        **Raises:**

        `UserError` if the record is damaged.
        """
        kept = starts_of(self.inputs_path, done)
        if not kept:
            return None
        inputs = kept[-1].get("inputs")
        if not isinstance(inputs, dict) or not all(isinstance(value, dict) for value in inputs.values()):
            raise UserError(f"{self.inputs_path} has a line without inputs: remove it")
        return inputs

    def times(self) -> list[dict[str, Any]]:
        """The objects of `times.jsonl`, one a start; none in an older folder, which has no such file."""
        return read_records(self.times_path) if self.times_path.exists() else []

    @abstractmethod
    def write_times(self, starts: Iterable[Mapping[str, Any]]) -> None:
        """Writes `times.jsonl` anew."""

    def comparison(self) -> dict[str, Any] | None:
        """What `comparison.json` holds, if it is there."""
        if not self.comparison_path.exists():
            return None
        try:
            return json.loads(self.comparison_path.read_bytes())
        except (OSError, ValueError):
            return None  # it can be measured again

    @abstractmethod
    def write_comparison(self, comparison: Mapping[str, Any]) -> None:
        """Writes `comparison.json`."""

    @abstractmethod
    def append_completions(self, completions: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines to `completions.jsonl`."""

    @abstractmethod
    def rewind(self, done: int) -> None:
        """Drops the records of the steps after the first `done`: a run resumed from there writes them again. To be
        called after each resume: a last line that a kill left half-written goes as well."""

    @abstractmethod
    def close(self) -> None:
        """Closes the files, and lets other processes have the folder."""

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
