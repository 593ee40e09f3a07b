"""The folder of a run: its configuration, its records, and the guard that one process at a time writes there."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from ..choices import TRACKERS
from ..errors import UserError
from ..files import json_line

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

    def write_config(self, text: str) -> None:
        """Writes `config.toml`, aside and renamed."""
        replace_file(self.config_path, text.encode())

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`. JSON has no NaN and no infinity: both become `null`."""
        self._append(self.metrics_path, [metrics])

    def write_machine(self, done: int, machine: Mapping[str, Any]) -> None:
        """Says in `machine.jsonl` what the steps after `done` of them are computed on. Starts whose steps are all done
        again are forgotten."""
        self._write_start(self.machine_path, done, machine)

    def read_machine(self, done: int) -> dict[str, Any] | None:
        """What the first `done` steps were computed on, the last of it if it changed; `None` if nothing says so."""
        kept = _starts_of(self.machine_path, done)
        return kept[-1] if kept else None

    def write_inputs(self, done: int, inputs: Mapping[str, Any]) -> None:
        """Says in `inputs.jsonl` what the steps after `done` of them are computed from, in the same way."""
        self._write_start(self.inputs_path, done, {"inputs": dict(inputs)})

    def read_inputs(self, done: int) -> dict[str, dict[str, Any]] | None:
        """What the first `done` steps were computed from, the last of them if it changed; `None` if nothing says so.

        **Raises:**

        `UserError` if the record is damaged.
        """
        kept = _starts_of(self.inputs_path, done)
        if not kept:
            return None
        inputs = kept[-1].get("inputs")
        if not isinstance(inputs, dict) or not all(isinstance(value, dict) for value in inputs.values()):
            raise UserError(f"{self.inputs_path} has a line without inputs: remove it")
        return inputs

    def times(self) -> list[dict[str, Any]]:
        """The objects of `times.jsonl`, one a start; none in an older folder, which has no such file."""
        return read_records(self.times_path) if self.times_path.exists() else []

    def write_times(self, starts: Iterable[Mapping[str, Any]]) -> None:
        """Writes `times.jsonl` anew."""
        self._replace(self.times_path, starts)

    def comparison(self) -> dict[str, Any] | None:
        """What `comparison.json` holds, if it is there."""
        if not self.comparison_path.exists():
            return None
        try:
            return json.loads(self.comparison_path.read_bytes())
        except (OSError, ValueError):
            return None  # it can be measured again

    def write_comparison(self, comparison: Mapping[str, Any]) -> None:
        """Writes `comparison.json`."""
        self._replace(self.comparison_path, [comparison])

    def append_completions(self, completions: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines to `completions.jsonl`."""
        self._append(self.completions_path, completions)

    def rewind(self, done: int) -> None:
        """Drops the records of the steps after the first `done`: a run resumed from there writes them again. To be
        called after each resume: a last line that a kill left half-written goes as well."""
        self._close_files()
        for path in (self.metrics_path, self.completions_path):
            if path.exists():
                lines = _records(path)
                steps = [_step(path, number, record) for number, _, record in lines]
                if steps[:1] == [0]:
                    anew = _counted_from_one([record for _, _, record in lines])
                    self._replace(path, [record for record in anew if record["step"] <= done])
                else:  # what is kept stays as it is, to the byte
                    kept = [line for step, (_, line, _) in zip(steps, lines, strict=True) if step <= done]
                    replace_file(path, b"".join(line + b"\n" for line in kept))

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

    def _replace(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        replace_file(path, _as_lines(records))

    def _write_start(self, path: Path, done: int, about: Mapping[str, Any]) -> None:
        self._replace(path, [*_starts_of(path, done), {"from_step": done + 1} | dict(about)])

    def _append(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        lines = _as_lines(records)
        try:
            if path not in self._files:
                # Unbuffered: a line is in the file, whole, when this returns.
                self._files[path] = open(path, "ab", buffering=0)
            _write_all(self._files[path], lines)
        except OSError as error:
            raise _write_error(path, error) from error


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl` or `completions.jsonl`, with steps counted from 1, whichever version wrote it.

    **Raises:**

    As `read_records`.
    """
    return _counted_from_one(read_records(path))


def _counted_from_one(records: list[dict[str, Any]], key: str = "step") -> list[dict[str, Any]]:
    """Records as they are written now: older ones begin with step 0."""
    if not records or records[0].get(key) != 0:
        return records
    return [record | {key: record[key] + 1} for record in records]


def _as_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    lines = (json_line(record) + "\n" for record in records)
    # A lone surrogate, half of a character that a completion broke off in, has no UTF-8.
    return "".join(lines).encode("utf-8", "replace")


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


def _starts_of(path: Path, done: int) -> list[dict[str, Any]]:
    """The records of the starts that the first `done` steps are of: what came of the others is done again."""
    starts = _records(path) if path.exists() else []
    for number, _, start in starts:
        _step(path, number, start, "from_step")
    anew = _counted_from_one([start for _, _, start in starts], "from_step")
    return [start for start in anew if start["from_step"] <= done]


def check_unused(path: Path) -> None:
    """Raises `UserError` if the folder holds a run, or anything else that a new run could spoil."""
    if not path.is_dir():
        return
    names = {entry.name for entry in path.iterdir()}
    # A run that stopped before its first step has written nothing worth keeping.
    ours = {_LOCK, "config.toml", "machine.jsonl", "inputs.jsonl", "times.jsonl", "trackers.json", *TRACKERS}
    if names and not (_LOCK in names and names <= ours):
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
