"""A limit on how long code may take that is not ours."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The time is over. Not an `Exception`, so that code which catches all of these does not go on."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises [`eqx_specgrpo.tasks.OutOfTime`][] within the block once it has taken so long; blocks may be nested.

    It is the process's own timer that rings, so that Python code ends where it stands. There is one on Unix, and it
    rings in the main thread; elsewhere a block takes as long as it takes. Code that uses the same timer (`SIGALRM`)
    puts the limit out of force.

    **Arguments:**

    - `seconds`: above 0; infinity is no limit.
    """
    if seconds == math.inf or not _has_timer():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise OutOfTime

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    if 0 < left < seconds:  # of the block around this one, which ends sooner
        signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)  # `None`: not of Python
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3))


def _has_timer() -> bool:
    # Windows has none.
    return "SIGALRM" in signal.Signals.__members__ and threading.current_thread() is threading.main_thread()
