"""Standard output and error that may be closed or full at any time."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from ..errors import UserError

_SIGPIPE = 13  # by which tools of C end where a pipe's reader has gone; Windows knows none


class OutputLost(UserError):
    """Standard output could not be written. Where its reader has gone, as `head` does, there is nothing to say."""

    def __init__(self, error: Exception):
        gone = isinstance(error, BrokenPipeError)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        super().__init__("" if gone else f"standard output could not be written, and its end is missing: {reason}")
        self.exit_code = 128 + _SIGPIPE if gone else 2


class GuardedOutput(io.TextIOBase):
    """A stream of text for what may get lost: writing to it raises nothing. What could not be written is dropped.

    **Arguments:**

    - `stream`: of text, where to write; `None`, as Python has it for a standard stream that was closed from the start,
        drops everything.

    **Attributes:**

    - `lost`: the first error, if there was one.
    """

    lost: Exception | None

    def __init__(self, stream: Any):
        super().__init__()
        self._stream = stream
        self.lost = None

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "utf-8" if self._stream is None else self._stream.encoding or "utf-8"  # of a StringIO it is None

    @property
    def errors(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self._stream is None else self._stream.errors

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._noting():
            try:
                self._open_stream().write(text)
            except UnicodeEncodeError:  # a locale without the characters, or half of one
                encoding = self.encoding
                self._open_stream().write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._noting():
            self._open_stream().flush()

    def _open_stream(self) -> Any:
        if self._stream is None:
            raise OSError("it is closed")
        return self._stream

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        # ValueError: closed since. RuntimeError: a signal's handler writes while this stream is being written to.
        except (OSError, ValueError, RuntimeError) as error:
            self.lost = self.lost or error


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Standard output and error are `GuardedOutput`s within the `with` block. At its end neither is left with anything
    that Python would fail to write when it ends."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(GuardedOutput, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            _let_go(stream)


def check_output_arrived() -> None:
    """For commands whose results go to standard output.

    **Raises:**

    [`eqx_specgrpo.runtime.OutputLost`][] if some of it could not be written.
    """
    sys.stdout.flush()
    if isinstance(sys.stdout, GuardedOutput) and sys.stdout.lost is not None:
        raise OutputLost(sys.stdout.lost)


def progress_console() -> Console:
    """For progress on standard output, which may be closed or full: then it is dropped, and the work goes on.

    In a notebook it is plain lines: rich would make each of them an output of its own, in HTML; and without that, since
    kernels ask for colours, it would take them for a terminal, and move a cursor that is not there.
    """
    guarded: Any = sys.stdout if isinstance(sys.stdout, GuardedOutput) else GuardedOutput(sys.stdout)
    in_notebook = "ipykernel" in sys.modules and not guarded.isatty()
    return Console(file=guarded, force_jupyter=False, force_terminal=False if in_notebook else None)


def plain_lines_in_notebooks() -> None:
    """Lets rich look at the streams themselves where a notebook has started this process, by `%%bash` for instance.

    A kernel asks all processes that it starts for colours (`FORCE_COLOR`). Rich takes that for a terminal, and would
    print a live line again and again into a stream that keeps every copy of it.
    """
    if "JPY_PARENT_PID" in os.environ and not (sys.stdout.isatty() or sys.stderr.isatty()):
        os.environ.pop("FORCE_COLOR", None)


def hold_standard_descriptors() -> None:
    """Opens the null device where a standard stream was closed from the start. Else the next file that is opened, a
    checkpoint perhaps, would get its number, and whatever a library written in C prints would land in that file."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _let_go(stream: Any) -> None:
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        # Python flushes once more when it ends, and would say that it can't, with an exit code of its own.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
