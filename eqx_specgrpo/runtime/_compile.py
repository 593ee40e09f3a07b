"""What JAX compiles, and how long it takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_COMPILED = "/jax/core/compile/backend_compile_duration"
# Shorter ones are the little programs that array indexing and the like make; nobody waits for them.
_WORTH_TELLING = 0.5
# A model of this hidden size or less computes in moments: what another program, or measuring, would save it, compiling
# takes.
SMALL_HIDDEN_SIZE = 256


class CompileCounter:
    """Counts compilations of programs while it is attached.

    **Attributes:**

    - `count`: programs compiled that took long enough to notice.
    - `seconds`: time spent compiling, small programs included.
    """

    count: int
    seconds: float

    def __init__(self, tell: Callable[[str], None] | None = None):
        self._tell = tell
        self.count = 0
        self.seconds = 0.0

    def attach(self) -> None:
        """Begins to count."""
        import jax  # here, so that a program can set up its process before JAX reads the environment

        jax.monitoring.register_event_duration_secs_listener(self)

    def detach(self) -> None:
        """Ends to count."""
        import jax

        jax.monitoring.unregister_event_duration_listener(self)

    def __call__(self, event: str, duration_secs: float, **details: Any) -> None:
        if event != _COMPILED:
            return
        self.seconds += duration_secs
        if duration_secs >= _WORTH_TELLING:
            self.count += 1
            if self._tell is not None:
                self._tell(f"compiled {details.get('fun_name', 'a program')} in {duration_secs:.1f} s")


@contextmanager
def count_compilations(tell: Callable[[str], None] | None = None) -> Iterator[CompileCounter]:
    """Attaches a counter for the length of a `with` block."""
    counter = CompileCounter(tell)
    counter.attach()
    try:
        yield counter
    finally:
        counter.detach()
