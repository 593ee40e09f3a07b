import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

# Nearly all of the suite's time is compiling tiny programs. XLA's newer fusion emitters make an MLIR context for each
# of them, a third of the time of all tests; the older emitters compute the same. Whoever sets XLA_FLAGS, to nothing
# even, tests with what is set: `XLA_FLAGS= python -m pytest` uses XLA as users have it.
_QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def _xla_knows(flags: str) -> bool:
    """XLA ends a process that sets a flag which its version does not have, so another process tries."""
    code = "import jax; jax.devices()"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


if "XLA_FLAGS" not in os.environ:  # in the workers of pytest-xdist it is, by their parent
    os.environ["XLA_FLAGS"] = _QUICK_TO_COMPILE if _xla_knows(_QUICK_TO_COMPILE) else ""

# A program is compiled once in a session: by its first test, for all files, workers and processes that tests start.
# Whoever names a folder keeps what is compiled there for the next session. The folder that is made here is removed.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="eqx_specgrpo_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.random as jr
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# A job in the background begins with Ctrl-C ignored, and under `nohup` with SIGHUP ignored as well. Runs leave that so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if os.name == "posix":
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)

# Tracing makes millions of small objects that live as long as their program. By its own counts the collector of cycles
# looks through all of them again and again: a tenth of the suite's time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def getkey():
    """A source of fresh keys, the same in every run: statistics and failures must be repeatable."""
    keys = iter(jr.split(jr.key(5678), 1000))
    return lambda: next(keys)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Lets go of a module's compiled programs: each holds memory mappings, of which Linux allows a process 65,530, and
    XLA does not survive the one too many."""
    yield
    jax.clear_caches()
