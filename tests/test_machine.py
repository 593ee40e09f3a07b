"""What is read of the machine, and what is said of it."""

import json
import os

import pytest

from eqx_specgrpo.train import _machine
from eqx_specgrpo.train._dtype_advice import dtype_advice, product_seconds
from eqx_specgrpo.train._machine import machine, stolen_seconds


def made_up(bfloat16_gains):
    """Products that take a second in float32, and in bfloat16 so many times less, by the rows."""

    def measure(dtype, rows, size):
        return 1.0 if dtype == "float32" else 1 / bfloat16_gains[rows]

    return measure


@pytest.mark.parametrize(
    ("gains", "faster"),
    [
        ({16: 0.6, 512: 0.5}, "float32"),  # bfloat16 units at half the rate of float32's
        ({16: 1.6, 512: 2.1}, "bfloat16"),
        ({16: 0.7, 512: 2.0}, None),  # which is better depends on the run
        ({16: 0.9, 512: 1.1}, None),  # nobody would notice
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_that_computes_faster_is_named(gains, faster, dtype):
    advice = dtype_advice(dtype, 576, made_up(gains))
    if faster is None or faster == dtype:
        assert advice is None
    else:
        assert advice is not None and f"model.dtype={faster}" in advice
        gain = max(gains[16], 1 / gains[16])
        assert f"{gain:.1f} (16 rows)" in advice


def test_products_of_a_small_model_are_not_measured():
    def measure(dtype, rows, size):
        raise AssertionError("measured")

    assert dtype_advice("float32", 128, measure) is None


@pytest.mark.parametrize("rows", [4, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_timed(dtype, rows):
    assert 0 < product_seconds(dtype, rows, 8) < 10


def test_the_machine_can_be_written_as_json():
    found = machine()
    assert json.loads(json.dumps(found)) == {**found, "load": found["load"] and list(found["load"])}
    assert found["cores"] >= 1 and found["processor"]


def test_stolen_time_is_what_linux_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(_machine, "Path", lambda _: file)
    (file := tmp_path / "stat").write_text("cpu  1 2 3 4 5 6 7 800 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    assert stolen_seconds() == 800 / os.sysconf("SC_CLK_TCK")
    file.write_text("cpu  1 2 3 4\n")  # before Linux 2.6.11
    assert stolen_seconds() is None
    file.unlink()
    assert stolen_seconds() is None
