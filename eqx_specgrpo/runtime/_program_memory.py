"""What compiled programs hold in the memory of the process, and when they are dropped."""

import ctypes
import gc
from collections.abc import Callable

from ._memory import host_memory

_SHARE = 8  # of the machine's memory, an eighth


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2` (malloc.h): numbers of bytes, and of chunks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def held_besides_arrays() -> int | None:
    """Bytes of the process's memory that are in use and are no JAX array; `None` where the allocator doesn't say."""
    import jax  # not with the package: `specgrpo --help` needs none of it

    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, TypeError, AttributeError):
        return None  # no glibc, or one before 2.33
    mallinfo2.restype = _MallocInfo
    info = mallinfo2()
    arrays = sum(array.nbytes for array in jax.live_arrays()) if jax.default_backend() == "cpu" else 0
    return info.uordblks + info.hblkhd - arrays


def most_for_programs() -> int | None:
    """Bytes that compiled programs may hold; `None` if it is not known how much memory there is."""
    memory = host_memory()
    return None if memory is None else memory.total // _SHARE


class ProgramMemory:
    """Drops all compiled programs once they hold too much.

    JAX keeps each program that it compiled, one for each shape of the arguments. An update of 30 unrolled layers holds
    160 MB, and where completions differ in length most steps have new shapes (docs/experiments.md, 2026-11-30: what
    compiled programs keep in memory). Programs that are needed again are read from JAX's cache
    (`keep_compiled_programs`), or compiled again. Nothing else changes.

    **Arguments:**

    - `limit`: bytes, by which what is held besides arrays may grow; `None`: without a limit.
    - `held`: how much that is now; `None` if it is not known.
    """

    def __init__(self, limit: int | None, held: Callable[[], int | None] = held_besides_arrays):
        self._limit, self._held = limit, held
        self._others = held() or 0  # data and other libraries: what is there without programs

    def look(self) -> int | None:
        """Drops the programs if they hold too much. Returns the bytes that this gave back, or `None` if nothing was
        dropped."""
        held = self._held()
        if self._limit is None or held is None or held - self._others <= self._limit:
            return None
        import jax

        jax.clear_caches()
        gc.collect()
        self._others = self._held() or 0
        return held - self._others
