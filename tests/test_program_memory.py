"""Compiled programs are dropped once they hold too much, and a run computes the same."""

import functools as ft
import io

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from tiny_run import tiny_config, tiny_folder as tiny_folder

from eqx_specgrpo import train
from eqx_specgrpo.decoding import CompileAtOnce, CompileBehind, CompileSparingly
from eqx_specgrpo.records import read_records
from eqx_specgrpo.runtime import ProgramMemory, held_besides_arrays, most_for_programs
from eqx_specgrpo.train import _loop as train_loop


def _held(amounts):
    return ft.partial(next, iter(amounts))


def test_programs_are_dropped_once_they_hold_more_than_the_limit():
    """What was held before counts for nothing, and what is left after dropping neither."""
    traced = []

    @jax.jit
    def double(x):
        traced.append(x)
        return 2 * x + 1

    double(jnp.ones(3))
    memory = ProgramMemory(10, _held([100, 105, 110, 111, 104, 114, 115, 104]))
    assert memory.look() is None and memory.look() is None
    double(jnp.ones(3))
    assert len(traced) == 1
    assert memory.look() == 7
    np.testing.assert_array_equal(double(jnp.ones(3)), 3 * np.ones(3))
    assert len(traced) == 2
    assert memory.look() is None
    assert memory.look() == 11


def test_without_a_limit_or_an_allocator_that_says_nothing_is_dropped():
    assert ProgramMemory(None, lambda: 10**15).look() is None
    assert ProgramMemory(0, lambda: None).look() is None


def test_what_is_held_grows_with_programs_and_not_with_arrays():
    """32 MB of arrays are made, then programs of a hundred products."""
    jax.block_until_ready(jnp.full((1024, 1024), 1.0))
    before = held_besides_arrays()
    assert before is not None, "of glibc, as on any common Linux"
    arrays = [jax.block_until_ready(jnp.full((1024, 1024), float(i))) for i in range(8)]
    with_arrays = held_besides_arrays()

    @jax.jit
    def many(x):
        for i in range(100):
            x = jnp.sin(x @ x) + i
        return x

    for size in range(2, 10):
        many(jnp.ones((size, size)))
    with_programs = held_besides_arrays()
    assert with_programs - with_arrays > 2e6 > abs(with_arrays - before) and len(arrays) == 8
    del many
    assert ProgramMemory(0, _held([0, with_programs, 0])).look() == with_programs
    assert held_besides_arrays() < with_programs - 1e6


def test_a_machine_s_programs_may_hold_an_eighth_of_its_memory():
    assert 1e8 < most_for_programs() < 1e12


def test_what_a_compiler_knows_to_be_there_is_forgotten():
    sparingly, behind = CompileSparingly(), CompileBehind()
    sparingly.ran("a")
    sparingly.forget()
    assert not sparingly.is_there("a")
    compiled = []

    class Program:
        def compile(self):
            compiled.append(True)

    for _ in range(2):
        while not behind.ready("b", lambda: lambda: [Program()]):
            pass
        assert behind.seconds("b") >= 0.0
        behind.forget()
    behind.close()
    CompileAtOnce().forget()
    assert len(compiled) == 2


def test_a_run_whose_programs_are_dropped_after_each_step_computes_the_same(tiny_folder, tmp_path, monkeypatch):
    found = []
    for name, limit in (("keeps", None), ("drops", 0)):
        held = iter(range(10**6))
        monkeypatch.setattr(train_loop, "ProgramMemory", lambda most, limit=limit: ProgramMemory(limit, held.__next__))  # noqa: B023
        out = io.StringIO()
        train.run(tiny_config(tiny_folder, tmp_path / name, "steps=2"), console=Console(file=out, width=200))
        assert (out.getvalue().count("dropped compiled programs") == 2) == (limit == 0)
        found.append(read_records(tmp_path / name / "metrics.jsonl"))
    compiling = [[step["compile/seconds"] for step in steps] for steps in found]
    assert compiling[1][1] - compiling[1][0] > 5 * (compiling[0][1] - compiling[0][0])
    for kept, dropped in zip(*found, strict=True):
        for key in ("loss", "reward", "grad_norm", "completions/mean_length", "draft/fingerprint"):
            np.testing.assert_array_equal(kept[key], dropped[key])
