"""Writing to the folder of a run: its configuration, its records, and the guard that one process at a time does so."""

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from ..choices import TRACKERS
from ..errors import UserError
from ..files import json_line
from ._record_lines import counted_from_one, records_of, starts_of, step_of
from ._run_folder import AbstractRunFolder

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


_LOCK = ".lock"
_AS_IT_WAS = (
    "what is in the run folder, its checkpoints included, is as it was. Make room there, then run again with --resume"
)


class RunFolder(AbstractRunFolder):
    """A run's folder, open for writing: held until `close` (or the end of a `with` block, or of the process).

    **Arguments:**

    - `path`: the folder; it is made, with its parents, for a new run.
    - `resume`: go on with the run that is there.

    **Raises:**

    `UserError` if the folder is in use by another process, holds a run and `resume` is false, or holds none and
    `resume` is true.
    """

    def __init__(self, path: Path, resume: bool = False):
        super().__init__(path)
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

    def write_config(self, text: str) -> None:
        replace_file(self.config_path, text.encode())

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        self._append(self.metrics_path, [metrics])

    def write_machine(self, done: int, machine: Mapping[str, Any]) -> None:
        self._write_start(self.machine_path, done, machine)

    def write_inputs(self, done: int, inputs: Mapping[str, Any]) -> None:
        self._write_start(self.inputs_path, done, {"inputs": dict(inputs)})

    def write_times(self, starts: Iterable[Mapping[str, Any]]) -> None:
        self._replace(self.times_path, starts)

    def write_comparison(self, comparison: Mapping[str, Any]) -> None:
        self._replace(self.comparison_path, [comparison])

    def append_completions(self, completions: Iterable[Mapping[str, Any]]) -> None:
        self._append(self.completions_path, completions)

    def rewind(self, done: int) -> None:
        self._close_files()
        for path in (self.metrics_path, self.completions_path):
            if path.exists():
                lines = records_of(path)
                steps = [step_of(path, number, record) for number, _, record in lines]
                if steps[:1] == [0]:
                    anew = counted_from_one([record for _, _, record in lines])
                    self._replace(path, [record for record in anew if record["step"] <= done])
                else:  # what is kept stays as it is, to the byte
                    kept = [line for step, (_, line, _) in zip(steps, lines, strict=True) if step <= done]
                    replace_file(path, b"".join(line + b"\n" for line in kept))

    def close(self) -> None:
        self._close_files()
        self._lock.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _replace(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        replace_file(path, _as_lines(records))

    def _write_start(self, path: Path, done: int, about: Mapping[str, Any]) -> None:
        self._replace(path, [*starts_of(path, done), {"from_step": done + 1} | dict(about)])

    def _append(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        lines = _as_lines(records)
        try:
            if path not in self._files:
                # Unbuffered: a line is in the file, whole, when this returns.
                self._files[path] = open(path, "ab", buffering=0)
            _write_all(self._files[path], lines)
        except OSError as error:
            raise _write_error(path, error) from error


class FollowedRunFolder(AbstractRunFolder):
    """A run's folder, of a run of several processes, in those that do not write to it: what would be written is not.

    **Arguments:**

    - `path`: the folder, on a file system that the process which writes sees as well.
    """

    def write_config(self, text):
        del text

    def append_metrics(self, metrics):
        del metrics

    def write_machine(self, done, machine):
        del done, machine

    def write_inputs(self, done, inputs):
        del done, inputs

    def write_times(self, starts):
        del starts

    def write_comparison(self, comparison):
        del comparison

    def append_completions(self, completions):
        del completions

    def rewind(self, done):
        del done

    def close(self):
        pass


def _as_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    lines = (json_line(record) + "\n" for record in records)
    # A lone surrogate, half of a character that a completion broke off in, has no UTF-8.
    return "".join(lines).encode("utf-8", "replace")


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
