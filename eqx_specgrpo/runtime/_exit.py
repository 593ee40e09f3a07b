"""How a command ends, whatever is called in it."""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..errors import Stopped, UserError
from ._environment import set_aside_number_settings

_OF_CTRL_C = 130


@contextmanager
def ending_on_our_terms(stopped_at_once: str) -> Iterator[None]:
    """Around what a command calls, code of the user's among it.

    A stop at once is told, and has the exit code of its signal. `sys.exit()`, which a draft's class may call, is an
    error: it would end the program with a code of its own, 0 for instance, as if all had gone well.

    **Arguments:**

    - `stopped_at_once`: what to say where a signal did not wait: what there is, and how to go on.

    **Raises:**

    `UserError` where something called `sys.exit()`, with the place.
    """
    try:
        yield
    except Stopped as stop:
        if stop.at_once:
            print(stopped_at_once, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(stopped_at_once, file=sys.stderr)
        sys.exit(_OF_CTRL_C)
    except SystemExit as error:
        # Trackers put functions of their own in the place of `sys.exit`: who called these is wanted.
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if frame.name != "exit"), frames[-1])
        raise UserError(
            f"{frame.filename}, line {frame.lineno}: sys.exit({error.code!r}) was called there; raise an exception "
            "that says what is wrong instead"
        ) from error


@contextmanager
def ending_of_one_of(processes: int) -> Iterator[None]:
    """Around what a command calls in one of several processes. Where it does not get to its end, the program ends at
    once, with the message and the exit code that one process alone would have: JAX waits at the end of a program for
    the other processes, and aborts if they do not come."""
    if processes == 1:
        yield
        return
    try:
        with plain_messages():
            yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        return
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextmanager
def plain_messages() -> Iterator[None]:
    """Around a program of ours. Warnings are a line on standard error, without a place in the source. What the user can
    mend is a message and an exit code: a `UserError`, what the system says of a file, too little memory. Any other
    exception is ours, and goes on."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        console.print(f"[bold yellow]warning:[/] {escape(str(message))}")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            for message in set_aside_number_settings():
                show(message)
            yield
        return
    except UserError as error:
        message, code = str(error), error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        message, code = f"{error.filename}: {error.strerror}", UserError.exit_code
    except MemoryError:
        message, code = "this machine's memory does not suffice: ask for less at a time", UserError.exit_code
    for line in message.splitlines():
        console.print(f"[bold red]error:[/] {escape(line)}")
    sys.exit(code)
