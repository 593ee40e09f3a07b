"""The folder of a run: its configuration, its records, and the guard that one process at a time writes there."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


_LOCK = ".lock"
_AS_IT_WAS = (
    "what is in the run folder, its checkpoints included, is as it was. Make room there, then run again with --resume"
)


class RunFolder:
    """Opens a run's folder for writing, and holds it until `close` (or the end of a `with` block, or of the process).

    - `config.toml`: the resolved configuration.
    - `metrics.jsonl`: one object a step, with its `step`.
    - `completions.jsonl`: one object a completion, with its `step`.
    - `machine.jsonl`: one object a start, of what the steps from `from_step` on were computed on.
    - `inputs.jsonl`: one object a start, of what they were computed from: fingerprints by name.
    - `checkpoints/`, `policy/`, `draft/`: written by others.

    **Arguments:**

    - `path`: the folder; it is made, with its parents, for a new run.
    - `resume`: go on with the run that is there.

    **Raises:**

    `UserError` if the folder is in use by another process, holds a run and `resume` is false, or holds none and
    `resume` is true.
    """

    path: Path

    def __init__(self, path: Path, resume: bool = False):
        self.path = path
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder: choose another run folder with --out")
        if resume and not self.config_path.exists():
            raise UserError(f"there is no run to resume in {path}: leave out --resume, or name its folder with --out")
        if not resume:
            check_unused(path)
        try:
            try_folder(path)
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
        except OSError as error:
            raise UserError(f"the folder {path} cannot be written: {error.strerror}; choose another --out") from None
        try:
            if not resume:
                check_unused(path)  # Again: another run may have come and gone before the lock was ours.
            self._files: dict[Path, IO[bytes]] = {}
        except UserError:
            self._lock.close()
            raise

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
    def policy_path(self) -> Path:
        return self.path / "policy"

    @property
    def draft_path(self) -> Path:
        return self.path / "draft"

    def write_config(self, text: str) -> None:
        """Writes `config.toml`, aside and renamed."""
        replace_file(self.config_path, text.encode())

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`. JSON has no NaN and no infinity: both become `null`."""
        self._append(self.metrics_path, [metrics])

    def write_machine(self, step: int, machine: Mapping[str, Any]) -> None:
        """Says in `machine.jsonl` what the steps from `step` on are computed on. Starts whose steps are all done again
        are forgotten."""
        self._write_start(self.machine_path, step, machine)

    def read_machine(self, step: int) -> dict[str, Any] | None:
        """What the steps before `step` were computed on, the last of them if it changed; `None` if nothing says so."""
        kept = _starts_before(self.machine_path, step)
        return kept[-1] if kept else None

    def write_inputs(self, step: int, inputs: Mapping[str, Any]) -> None:
        """Says in `inputs.jsonl` what the steps from `step` on are computed from, in the same way."""
        self._write_start(self.inputs_path, step, {"inputs": dict(inputs)})

    def read_inputs(self, step: int) -> dict[str, dict[str, Any]] | None:
        """What the steps before `step` were computed from, the last of them if it changed; `None` if nothing says so.

        **Raises:**

        `UserError` if the record is damaged.
        """
        kept = _starts_before(self.inputs_path, step)
        if not kept:
            return None
        inputs = kept[-1].get("inputs")
        if not isinstance(inputs, dict) or not all(isinstance(value, dict) for value in inputs.values()):
            raise UserError(f"{self.inputs_path} has a line without inputs: remove it")
        return inputs

    def append_completions(self, completions: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines to `completions.jsonl`."""
        self._append(self.completions_path, completions)

    def rewind(self, step: int) -> None:
        """Drops the records of `step` and later ones: a run resumed from the checkpoint after `step` steps writes them
        again. To be called after each resume: a last line that a kill left half-written goes as well."""
        self._close_files()
        for path in (self.metrics_path, self.completions_path):
            if path.exists():
                lines = [
                    line + b"\n"
                    for number, line, record in _records(path)
                    if _step(path, number, record) < step
                ]  # fmt: skip
                replace_file(path, b"".join(lines))

    def close(self) -> None:
        """Closes the files, and lets other processes have the folder."""
        self._close_files()
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _write_start(self, path: Path, step: int, about: Mapping[str, Any]) -> None:
        starts = [*_starts_before(path, step), {"from_step": step} | dict(about)]
        replace_file(path, "".join(json.dumps(_plain(start)) + "\n" for start in starts).encode())

    def _append(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(_plain(record), allow_nan=False, ensure_ascii=False) + "\n" for record in records)
        try:
            if path not in self._files:
                # Unbuffered: a line is in the file, whole, when this returns.
                self._files[path] = open(path, "ab", buffering=0)
            # A lone surrogate, half of a character that a completion broke off in, has no UTF-8.
            _write_all(self._files[path], text.encode("utf-8", "replace"))
        except OSError as error:
            raise _write_error(path, error) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl` or `completions.jsonl`; a half-written last line is left out.

    **Raises:**

    `UserError` if the file is missing, or has a line that is no JSON object.
    """
    return [record for _, _, record in _records(path)]


def _records(path: Path) -> list[tuple[int, bytes, dict[str, Any]]]:
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


def _step(path: Path, number: int, record: Mapping[str, Any], name: str = "step") -> int:
    step = record.get(name)
    if not isinstance(step, int):
        raise UserError(f"line {number} of {path} has no {name}: remove it")
    return step


def _starts_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of starts at earlier steps: what came of the others is done again."""
    starts = _records(path) if path.exists() else []
    return [start for number, _, start in starts if _step(path, number, start, "from_step") < step]


def check_unused(path: Path) -> None:
    """Raises `UserError` if the folder holds a run, or anything else that a new run could spoil."""
    if not path.is_dir():
        return
    names = {entry.name for entry in path.iterdir()}
    # A run that stopped before its first step has written nothing worth keeping.
    if names and not (_LOCK in names and names <= {_LOCK, "config.toml", "machine.jsonl", "inputs.jsonl"}):
        raise UserError(
            f"the folder {path} already holds a run or other files: go on with it with --resume, or choose another "
            "with --out"
        )


def try_folder(folder: Path) -> None:
    """Writes into a folder and leaves it as it was, or not there: to be done before the work whose results go there.

    **Raises:**

    `UserError` if it cannot be written, a full disk included.
    """
    made = []
    probe = folder / f".tmp-tried-{os.getpid()}"
    try:
        for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
            missing.mkdir()
            made.append(missing)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be written: {error.strerror}; choose another with --out"
        ) from error
    finally:
        for place in reversed(made):
            with contextlib.suppress(OSError):  # somebody else has put something there
                place.rmdir()


def _lock(folder: Path) -> IO[bytes]:
    file = open(folder / _LOCK, "ab")
    try:
        if sys.platform == "win32":
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"another process is writing to the run folder {folder}: wait for it, or choose another with --out"
        ) from None
    return file


def replace_file(path: Path, content: bytes, otherwise: str = _AS_IT_WAS) -> None:
    """Writes a file aside and renames it, so that it is either the old one or the new one, and whole.

    **Arguments:**

    - `otherwise`: a sentence for the case that it could not be written, of a file that is not of a run.

    **Raises:**

    `UserError` if it could not be written.
    """
    aside = path.with_name(f".tmp-{path.name}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise _write_error(path, error, otherwise) from error


def _write_all(file: IO[bytes], content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def _write_error(path: Path, error: OSError, otherwise: str = _AS_IT_WAS) -> UserError:
    return UserError(f"{path} could not be written: {error.strerror}; {otherwise}")


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays and scalars of numpy and JAX become numbers and lists."""
    match value:
        case None | str() | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            array = np.asarray(value)
            if array.dtype == object:
                raise TypeError(f"{value!r} cannot be written as JSON")
            return _plain(array.tolist())
