import jax
import jax.random as jr
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey():
    """A source of fresh keys, the same in every run: statistics and failures must be repeatable."""
    keys = iter(jr.split(jr.key(5678), 1000))
    return lambda: next(keys)
