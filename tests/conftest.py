from collections.abc import Iterator

import jax
import jax.random as jr
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


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
