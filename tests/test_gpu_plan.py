"""Programs as shapes, and how `benchmarks/gpu_plan.py` reads what they are compiled to. (`.ci/gpu` compiles them.)"""

import argparse
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import tiny_transformer

from eqx_specgrpo.decoding import Block, FixedRounds, Sampling, decode_programs
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.models import Program

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_plan
import gpu_target

THUNKS = """\
001: kCopy         [source       | next=005 (4)] kCopy
005: kWhile        [prev=004 (1) | next=000 (1)]
condition:
    006: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        007: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1] threads: [1, 1, 1]
        008: kAllGatherStart [source | sink] all-gather-start
        009: kAllGatherDone [source | sink] all-gather-done
    010: kWhile        [source | sink]
      body:
        011: kCustomKernel [source | sink] inner
012: kCustomKernel [prev=001 | sink] input_reduce_fusion_2
"""


def test_thunks_are_read_by_their_place():
    found = list(gpu_target.read_thunks(THUNKS))
    assert [(one.name, one.loops, one.is_buffered) for one in found] == [
        ("kCopy", 0, False),
        ("loop_compare_fusion", 1, False),
        ("loop_add_fusion", 1, True),
        ("all-gather-start", 1, True),
        ("all-gather-done", 1, True),
        ("inner", 2, False),
        ("input_reduce_fusion_2", 0, False),
    ]


def test_copies_of_large_arrays_are_counted():
    text = """
      %copy.1 = bf16[16,3,64,2304]{3,2,1,0} copy(%state)
      %copy.2 = f32[16]{0} copy(%small)
      %copy-start.1 = (bf16[8]{0}) copy-start(%other)
      ROOT %copy.3 = bf16[16,3,64,2304]{3,2,1,0} copy(%again)
      %fusion = bf16[16,3,64,2304]{3,2,1,0} fusion(%copy.3)
    """
    assert gpu_target.large_copies(text) == {"bf16[16,3,64,2304]": 2}


HLO = """\
HloModule jit_run, entry_computation_layout={()->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: f32[16]) -> f32[16] {
  ROOT %gather = f32[16]{0} all-gather(%p), dimensions={0}
}

%body.1 (p: (f32[16])) -> (f32[16]) {
  %one = f32[16]{0} all-reduce-start(%p), to_apply=%add
  %two = f32[16]{0} all-reduce-done(%one)
  ROOT %called = (f32[16]{0}) call(%two), to_apply=%inner
}

%condition.1 (p: (f32[16])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p: f32[16]) -> (f32[16]) {
  %before = f32[16]{0} all-reduce(%p), to_apply=%add
  ROOT %while.1 = (f32[16]{0}) while(%before), condition=%condition.1, body=%body.1
}
"""


def test_collectives_of_a_program_without_thunks_are_read_by_their_place():
    once, looped = gpu_target.collectives_of(HLO)
    assert (once, looped) == ({"all-reduce": 1}, {"all-reduce": 1, "all-gather": 1})


def test_computations_are_divided_into_those_of_loops_and_others():
    """What a loop's body calls is in the loop, however deep."""
    outside, inside = gpu_target.split_by_loops(HLO)
    names = [[body.split()[body.startswith("ENTRY")] for body in bodies] for bodies in (outside, inside)]
    assert names == [["%main"], ["%add", "%inner", "%body.1", "%condition.1"]]


PLAN = gpu_target.Plan(
    argument_bytes=3_000_000,
    output_bytes=1_000_000,
    alias_bytes=1_000_000,
    temporary_bytes=500_000,
    kernels=5,
    kernels_in_loop=100,
    kernels_in_loop_buffered=99,
    collectives={},
    collectives_in_loop={},
    custom_calls={},
    host_calls=(),
    copies={},
    copies_in_loop={},
    seconds=1.0,
)


def test_a_plan_for_a_tpu_says_nothing_of_kernels():
    asked = argparse.Namespace(devices=1, new=2048, target="v5e")
    plan = PLAN._replace(kernels=None, kernels_in_loop=None, kernels_in_loop_buffered=None)
    assert gpu_plan.broken_promises("segment of length 3", plan, asked) == []
    # There a cache may be copied between rounds, as each segment begins and ends, and in none.
    copied = {"bf16[16,3,2560,64]": 4}
    assert gpu_plan.broken_promises("segment of length 3", plan._replace(copies=copied), asked) == []
    in_rounds = plan._replace(copies=copied, copies_in_loop=copied)
    assert gpu_plan.broken_promises("segment of length 3", in_rounds, asked) == ["copies a cache: bf16[16,3,2560,64]"]
    too_large = gpu_plan.broken_promises("update", plan._replace(temporary_bytes=20 << 30), asked)
    assert too_large == ["needs 20.0 GiB of 16.0"]


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ({}, None),
        ({"host_calls": ("xla_ffi_python_gpu_callback",)}, "asks the host: xla_ffi_python_gpu_callback"),
        ({"collectives": {"all-reduce": 1}}, "collectives on one device"),
        ({"copies": {"bf16[16,3,64,2304]": 2}}, "copies a cache: bf16"),
        ({"copies": {"bf16[16,2304]": 2}}, None),
        ({"kernels_in_loop_buffered": 90}, "has 10 kernels a round outside of buffers"),
        ({"alias_bytes": 0}, "keeps 1000000 bytes of its state twice"),
        ({"temporary_bytes": 200 << 30}, "needs 200.0 GiB of 141.0"),
    ],
)
def test_promises(fault, complaint):
    asked = argparse.Namespace(devices=1, new=2048, target="h200")
    broken = gpu_plan.broken_promises("segment of length 3", PLAN._replace(**fault), asked)
    assert broken == [] if complaint is None else complaint in broken[0]


@pytest.mark.parametrize(
    ("target", "advice"),
    [("h200", "pip install --no-deps jax-cuda12-plugin=="), ("v5e", "pip install --no-deps libtpu, in the version")],
)
def test_a_machine_without_the_compiler_is_told_what_to_install(target, advice, monkeypatch):
    def unknown(**_):
        raise RuntimeError("Unknown backend cuda")

    monkeypatch.setattr(gpu_target.topologies, "get_topology_desc", unknown)
    with pytest.raises(SystemExit, match=advice):
        gpu_target.mesh_of(target, 1)


def test_programs_of_a_decoding_lower_from_shapes_alone():
    target, draft = eqx.filter_eval_shape(lambda: (tiny_transformer(), MedusaHeads.fresh(16, 2)))
    found = decode_programs(
        target, draft, Block(), Sampling(), prompts=2, samples=4, prompt_length=6, new_tokens=9, lengths=(0, 2),
        loop=FixedRounds(), cache_dtype="float32",
    )  # fmt: skip
    assert [program.name for program in found] == ["prefill", "segment of length 0", "segment of length 2", "shrink"]
    text = {program.name: program.lower().as_text() for program in found}
    # Of the segment's arguments the state is donated, and the caches with it.
    assert "tensor<8x" in text["segment of length 2"] and "tf.aliasing_output" in text["segment of length 2"]
    assert "tf.aliasing_output" not in text["shrink"]


def test_a_program_runs_as_its_function_does():
    def scale(x, factor, *, plus):
        return {"of": (factor * x + plus,), "name": "static"}

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    compiled = Program("scale", eqx.filter_jit(scale), (shape, 2), {"plus": shape}).lower().compile()
    x, plus = jr.normal(jr.key(0), (2, 3))
    assert jnp.allclose(compiled(x, None, {"plus": plus})["of"][0], 2 * x + plus)
