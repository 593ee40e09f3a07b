"""What is read of the machine, and what is said of it."""

import json
import os
import re
import subprocess

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from eqx_specgrpo.config import _dtype_advice
from eqx_specgrpo.config._dtype_advice import dtype_advice, product_seconds
from eqx_specgrpo.models import platform_of
from eqx_specgrpo.records import _machine
from eqx_specgrpo.records._machine import machine, stolen_seconds
from eqx_specgrpo.runtime import _version


def made_up(bfloat16_gains, sizes=None):
    """Products that take a second in float32, and in bfloat16 so many times less, by the rows."""

    def measure(rows, size):
        if sizes is not None:
            sizes.append(size)
        return {"float32": 1.0, "bfloat16": 1 / bfloat16_gains[rows]}

    return measure


@pytest.mark.parametrize(
    ("gains", "faster"),
    [
        ({16: 0.6, 512: 0.5}, "float32"),  # bfloat16 units at half the rate of float32's
        ({16: 1.6, 512: 2.1}, "bfloat16"),
        ({16: 1.05, 512: 0.65}, "float32"),  # a round reads fewer bytes in bfloat16, an update gains more in float32
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
        gain = gains[16] if faster == "bfloat16" else 1 / gains[16]
        assert f"{gain:.1f} (16 rows)" in advice


@pytest.mark.parametrize(("hidden_size", "measured"), [(128, []), (256, []), (257, [257] * 2), (4096, [1024] * 2)])
def test_products_of_the_models_size_are_measured(hidden_size, measured):
    sizes = []
    advice = dtype_advice("float32", hidden_size, made_up({16: 3.0, 512: 3.0}, sizes))
    assert sizes == measured and (advice is None) == (not measured)


def test_nothing_is_measured_where_another_device_computes(monkeypatch):
    monkeypatch.setattr(_dtype_advice, "platform_of", lambda tree: "gpu")
    sizes = []
    assert dtype_advice("float32", 576, made_up({16: 3.0, 512: 3.0}, sizes)) is None and sizes == []


def test_products_are_timed_in_both_dtypes(monkeypatch):
    """By a clock that goes on by a second for each row of a product, and half of one in bfloat16."""
    now, real = [0.0], _dtype_advice.matmul

    def matmul(x, weight):
        product = real(x, weight)
        passed = x.shape[0] if weight.dtype == jnp.float32 else x.shape[0] / 2
        jax.debug.callback(lambda _: now.__setitem__(0, now[0] + passed), product[0, 0], ordered=True)
        return product

    monkeypatch.setattr(_dtype_advice, "matmul", matmul)
    monkeypatch.setattr(_dtype_advice.time, "perf_counter", lambda: (jax.effects_barrier(), now[0])[1])
    assert product_seconds(4, 8) == {"float32": 8 * 4.0, "bfloat16": 8 * 2.0}, "eight weights where rows are few"
    assert product_seconds(512, 8) == {"float32": 512.0, "bfloat16": 256.0}


def test_the_machine_can_be_written_as_json():
    found = machine()
    assert json.loads(json.dumps(found)) == {**found, "load": found["load"] and list(found["load"])}
    assert found["cores"] >= 1 and found["processor"]


def test_the_commit_is_that_of_this_package_and_of_no_repository_around_it(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    source = tmp_path / "package" / "_version.py"
    source.parent.mkdir()
    source.write_text("version = 1\n", encoding="utf-8")
    monkeypatch.setattr(_version, "__file__", str(source))
    assert _version.source_commit() is None, "no repository"
    git("init")
    git("commit", "--allow-empty", "-m", "of someone else")
    assert _version.source_commit() is None, "installed in a repository that does not hold it"
    git("add", ".")
    git("commit", "-m", "its own")
    commit = _version.source_commit()
    assert commit is not None and re.fullmatch("[0-9a-f]{7,40}", commit)
    source.write_text("version = 2\n", encoding="utf-8")
    assert _version.source_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert _version.source_commit() is None, "no git"


def test_stolen_time_is_what_linux_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(_machine, "Path", lambda _: file)
    (file := tmp_path / "stat").write_text("cpu  1 2 3 4 5 6 7 800 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    assert stolen_seconds() == 800 / os.sysconf("SC_CLK_TCK")
    file.write_text("cpu  1 2 3 4\n")  # before Linux 2.6.11
    assert stolen_seconds() is None
    file.unlink()
    assert stolen_seconds() is None


@pytest.mark.parametrize(("platform", "expected"), [("cuda", "gpu"), ("gpu", "gpu"), ("tpu", "tpu"), ("cpu", "cpu")])
def test_the_platform_is_that_of_the_arrays_and_else_the_default_one(platform, expected, monkeypatch):
    here, shape = jnp.zeros(2), jax.ShapeDtypeStruct((2,), jnp.float32)
    placed = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=SingleDeviceSharding(jax.devices("cpu")[0]))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert platform_of({"weight": here}) == platform_of((None, 3, placed, shape)) == "cpu"
    assert platform_of(shape) == platform_of(()) == expected
    seen = []
    jax.make_jaxpr(lambda x: seen.append(platform_of(x)) or x)(here)
    assert seen == [expected], "an array that is traced lies nowhere"


def test_the_default_device_is_the_platform_of_what_lies_nowhere(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_device(jax.devices("cpu")[0]):
        assert platform_of(()) == "cpu"
