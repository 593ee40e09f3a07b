"""Ctrl-C as a request: the first one asks to stop at a good place, the second one stops at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts(tell: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Within the `with` block, what it yields says whether Ctrl-C was pressed; `tell` is called when it is."""
    asked = False

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        del frame
        if asked:
            raise KeyboardInterrupt
        asked = True
        tell()

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread, where signals can't be taken: the caller's business then
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
