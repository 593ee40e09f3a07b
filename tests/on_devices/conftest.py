"""Tests on four CPU devices. The number of devices can't be changed once JAX has begun, so that they have a process of
their own: `test_on_devices.py` starts it, a file at a time, and `python -m pytest tests/on_devices` all of it."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(scope="session", autouse=True)
def _four_devices():
    assert jax.device_count() == 4, "JAX had begun before the number of devices was set"
