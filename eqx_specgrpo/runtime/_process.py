"""What a program says about its own process, before it computes. Nothing here is done by importing the library."""

import ctypes
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

_CACHE_DIR, _MIN_SECONDS = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_KEEP_FROM = 0.2  # seconds of compiling


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles, so that a second start is quick. The command line does so; scripts and notebooks
    call it, before JAX is imported or later, and share what is kept.

    The user's own settings come first: `JAX_COMPILATION_CACHE_DIR`, or a folder that was set in `jax.config`. By
    default it is a folder a machine below `~/.cache/eqx_specgrpo`, because programs are made for the processor, and
    home folders are shared. Where there is no home folder, or nothing can be written to it, programs are compiled at
    every start.
    """
    is_set = _CACHE_DIR in os.environ
    folder = os.environ[_CACHE_DIR] if is_set else _default_cache()
    if folder is None:
        return
    # For this process, if it has yet to import JAX, and for those that it starts.
    os.environ.setdefault(_CACHE_DIR, folder)
    os.environ.setdefault(_MIN_SECONDS, str(_KEEP_FROM))
    if "jax" in sys.modules:
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        if not is_set and jax.config.values["jax_compilation_cache_dir"] is None:
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _KEEP_FROM)
            compilation_cache.reset_cache()  # JAX has looked for a folder once, if it has compiled anything


def _default_cache() -> str | None:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "eqx_specgrpo" / platform.node()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return str(folder) if os.access(folder, os.W_OK | os.X_OK) else None


def kept_programs() -> tuple[Path, int] | None:
    """The folder where JAX keeps what it compiles, and how many programs are there; `None` if it keeps nothing."""
    import jax  # here, so that a program can set up its process before JAX reads the environment

    settings = jax.config.values
    folder = settings["jax_compilation_cache_dir"]
    if not folder or not settings["jax_enable_compilation_cache"]:
        return None
    # JAX calls them so; where it doesn't, as in a bucket of a cloud, none are counted.
    return Path(folder), sum(1 for _ in Path(folder).glob("*-cache"))


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
