"""What JAX compiles, and how long it takes."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Tracing, lowering and XLA's compilation: of each, JAX says when it begins (as a scalar) and how long it took.
_COMPILED = "/jax/core/compile/backend_compile_duration"
_STAGES = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration", _COMPILED)
_LOADED = "/jax/compilation_cache/cache_hits"
# Shorter ones are the little programs that array indexing and the like make; nobody waits for them.
_WORTH_COUNTING, _WORTH_TELLING = 0.5, 2.0
# A model of this hidden size or less computes in moments: what another program, or measuring, would save it, compiling
# takes.
SMALL_HIDDEN_SIZE = 256


class CompileCounter:
    """Counts compilations of programs while it is attached.

    **Arguments:**

    - `tell`: called with a sentence about each program that took long enough to notice, when it is there.
    - `watch`: called with the name of the program whose compilation begins, and with `None` when it ends.

    **Attributes:**

    - `count`: programs compiled that took long enough to notice.
    - `programs`: programs compiled, small ones and loaded ones included.
    - `loaded`: of them, those that came from the compilation cache.
    - `seconds`: time spent compiling, tracing and small programs included, in the thread that has attached it: what it
        has waited for.
    - `seconds_behind`: the same in other threads.
    """

    count: int
    programs: int
    loaded: int
    seconds: float
    seconds_behind: float

    def __init__(self, tell: Callable[[str], None] | None = None, watch: Callable[[str | None], None] | None = None):
        self._tell, self._watch = tell, watch
        self.count = self.programs = self.loaded = 0
        self.seconds = self.seconds_behind = 0.0
        self._waiting = threading.get_ident()
        # Of each thread: stages under way, since a little program may be compiled while a larger one is traced; and
        # seconds of stages that have led to no program yet.
        self._under_way: dict[int, int] = {}
        self._untold: dict[int, float] = {}

    def attach(self) -> None:
        """Begins to count."""
        import jax  # here, so that a program can set up its process before JAX reads the environment

        self._waiting = threading.get_ident()
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)
        jax.monitoring.register_event_listener(self._event)

    def detach(self) -> None:
        """Ends to count."""
        import jax

        jax.monitoring.unregister_scalar_listener(self._begin)
        jax.monitoring.unregister_event_duration_listener(self._end)
        jax.monitoring.unregister_event_listener(self._event)

    def _begin(self, event: str, value: float, **details: Any) -> None:
        del value
        if event not in _STAGES:
            return
        thread = threading.get_ident()
        self._under_way[thread] = self._under_way.get(thread, 0) + 1
        if self._watch is not None and self._under_way[thread] == 1 and thread == self._waiting:
            self._watch(_name(details))

    def _end(self, event: str, duration_secs: float, **details: Any) -> None:
        if event not in _STAGES:
            return
        thread = threading.get_ident()
        self._under_way[thread] = max(0, self._under_way.get(thread, 0) - 1)
        if self._under_way[thread] == 0:
            # Tracing counts once something is compiled: to ask for shapes alone also traces, and compiles nothing.
            untold = self._untold.pop(thread, 0.0) + duration_secs
            if event != _COMPILED:
                self._untold[thread] = untold
            elif thread == self._waiting:
                self.seconds += untold
            else:
                self.seconds_behind += untold
            if self._watch is not None and thread == self._waiting:
                self._watch(None)
        if event != _COMPILED:
            return
        self.programs += 1
        self.count += duration_secs >= _WORTH_COUNTING
        if duration_secs >= _WORTH_TELLING and self._tell is not None:
            behind = "" if thread == self._waiting else ", while decoding went on"
            self._tell(f"compiled {_name(details)} in {duration_secs:.1f} s{behind}")

    def _event(self, event: str, **details: Any) -> None:
        del details
        self.loaded += event == _LOADED


def _name(details: dict[str, Any]) -> str:
    """Of a program: its function's, which JAX puts into `jit(...)` in some places."""
    return re.sub(r"^jit\((.*)\)$", r"\1", str(details.get("fun_name", "a program")))


@contextmanager
def count_compilations(tell: Callable[[str], None] | None = None) -> Iterator[CompileCounter]:
    """Attaches a counter for the length of a `with` block."""
    counter = CompileCounter(tell)
    counter.attach()
    try:
        yield counter
    finally:
        counter.detach()
