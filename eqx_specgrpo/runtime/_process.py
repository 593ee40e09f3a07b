"""What a program says about its own process, before it computes. Nothing here is done by importing the library."""

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles, so that a second start is quick; the user's own settings come first.

    A folder a machine, because programs are made for the processor, and home folders are shared. Where there is no home
    folder, or nothing can be written to it, programs are compiled at every start.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = cache / "eqx_specgrpo" / platform.node()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            return
        if not os.access(folder, os.W_OK | os.X_OK):
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


# glibc's names of what `mallopt` sets (malloc.h), and what they are set to.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_KEEP_FREED_MEMORY = {_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0, _M_ARENA_MAX: 1}


def keep_freed_memory() -> None:
    """Where the CPU computes: lets the process keep the large buffers that it frees, for the next ones.

    glibc gives them back to the system, and each program that XLA runs takes gigabytes: its pages would be mapped and
    cleared anew every time, which is up to a third of an update (docs/performance.md). To be said before anything
    is computed, for the whole process and for good. A user who has set up malloc otherwise is left alone.
    """
    if _computes_elsewhere() or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return  # no glibc
    for parameter, value in _KEEP_FREED_MEMORY.items():
        mallopt(parameter, value)


def _computes_elsewhere() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return any(importlib.metadata.entry_points(group="jax_plugins"))
