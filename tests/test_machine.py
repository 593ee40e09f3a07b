"""What is read of the machine, and what is said of it."""

import json
import os

import jax
import pytest

from eqx_specgrpo.train import _machine
from eqx_specgrpo.train._machine import cpu_features, dtype_advice, machine, stolen_seconds


def test_a_processor_without_bfloat16_is_told_of():
    advice = dtype_advice("bfloat16", frozenset({"avx2", "fma"}))
    assert advice is not None and "model.dtype=float32" in advice


@pytest.mark.parametrize("features", [None, frozenset({"avx512_bf16"}), frozenset({"amx_bf16"}), frozenset({"bf16"})])
def test_nothing_is_said_where_it_may_be_fast_or_is_not_known(features):
    assert dtype_advice("bfloat16", features) is None


def test_float32_needs_no_advice():
    assert dtype_advice("float32", frozenset({"avx2"})) is None


def test_what_linux_says_of_this_processor():
    features = cpu_features()
    if jax.default_backend() != "cpu":
        assert features is None
    elif machine()["system"] in ("Linux x86_64", "Linux AMD64"):
        assert features is not None and "sse2" in features, "every 64-bit x86 has it"
    elif machine()["system"] == "Linux aarch64":
        assert features is not None and "asimd" in features
    else:
        assert features is None


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
