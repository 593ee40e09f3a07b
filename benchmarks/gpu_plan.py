"""What our programs need and do on a GPU or TPU that is not there: they are compiled for it, and nothing is run.

    pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2    # as your jax; half a gigabyte unpacked
    python benchmarks/gpu_plan.py --out results/gpu_plan
    python benchmarks/gpu_plan.py --out results/gpu_plan --models qwen3-8b --lora-rank 16 --devices 4
    python benchmarks/gpu_plan.py --out results/gpu_plan --target v5e    # a TPU; after pip install --no-deps libtpu
    python benchmarks/gpu_plan.py --out results/gpu_plan --check    # two layers; exit code 1 if a promise is broken

For each program: bytes a device; kernels that are launched once and a round (a turn of the outermost loop), and how
many of the latter a command buffer holds (a CUDA graph, replayed as one launch); collectives; calls of the host; large
arrays that are copied whole. Weights, prompts and rollouts are shapes: nothing of their size exists here. Rows are
divided over `--devices`, weights are whole on each.

What cannot be seen so: time, kernels of a TPU's program, and which kernels of matrix products are best, which XLA tries
on a device.

`--check` holds the programs to what they promise. No host is asked, and there is no collective on one device; a decode
segment copies no cache (on a TPU: in no round), overwrites its state instead of keeping two, has all kernels of a round
in command buffers, and on several devices at most one collective a round.
Writes `gpu_plan.json`.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from gpu_target import (
    COLLECTIVES,
    TARGETS,
    AsksTheHost,
    Plan,
    compile_with_thunks,
    memory_of,
    mesh_of,
    placed,
    read_plan,
)
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from eqx_specgrpo.bench import whole_numbers
from eqx_specgrpo.decoding import Block, Sampling, decode_programs
from eqx_specgrpo.distill import DraftBatch, ForwardKL, draft_gradients
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.grpo import LossNormalizer, LossSettings, UpdateBatch, compute_copy, policy_gradients
from eqx_specgrpo.layout import DATA, MODEL, AbstractDeviceMesh, DeviceMesh, Layout
from eqx_specgrpo.models import Adapters, Features, Program, Transformer, TransformerConfig, platform_of
from eqx_specgrpo.records import machine


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> TransformerConfig:
    return TransformerConfig(
        151936, hidden, intermediate, layers, heads, 8, 128, 40960, 1e6, qk_norm=True, tie_embeddings=tied
    )


# Sizes as the models' own `config.json` has them.
MODELS = {
    "smollm2-135m": TransformerConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, 1e5, norm_eps=1e-5, tie_embeddings=True),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
}
DRAFT_LENGTH = 3


def shapes_of_model(name: str, layers: int | None) -> tuple[Transformer, MedusaHeads]:
    """A model and heads in bfloat16, of shapes alone."""
    config = MODELS[name] if layers is None else dataclasses.replace(MODELS[name], num_layers=layers)

    def make() -> tuple[Transformer, MedusaHeads]:
        draft = MedusaHeads.fresh(config.hidden_size, DRAFT_LENGTH)
        return compute_copy(Transformer(config, key=jr.key(0)), "bfloat16"), compute_copy(draft, "bfloat16")

    return eqx.filter_eval_shape(make)


def of_update(target: Transformer, asked: argparse.Namespace, mesh: AbstractDeviceMesh) -> Program:
    """The gradients of one micro-batch, whose rows share a prompt on each device. Weights are divided as in a run."""
    rows, new = asked.rows, asked.new
    ints, floats = _array((rows,), jnp.int32), _array((rows, new))
    batch = UpdateBatch(
        tokens=_array((rows, asked.prompt + new), jnp.int32),
        prompt_lengths=ints,
        completion_tokens=_array((rows, new), jnp.int32),
        completion_mask=_array((rows, new), jnp.bool_),
        old_logprobs=floats,
        advantages=_array((rows,)),
        prompt_rows=_array((asked.devices,), jnp.int32),
        prompt_of_row=ints,
        completion_lengths=ints,
    )
    normalizer, settings = eqx.filter_eval_shape(
        lambda: (LossNormalizer(1, 1, 1), LossSettings(gradient_checkpointing=not asked.keep_all))
    )
    options: dict[str, Any] = {"mesh": mesh}
    if asked.lora_rank > 0:
        made = eqx.filter_eval_shape(
            lambda: Adapters.fresh(target.config, asked.lora_rank, 2.0 * asked.lora_rank, "all-linear", key=jr.key(0))
        )
        options["adapters"] = divided(mesh, made)
    return Program("update", policy_gradients, (divided(mesh, target), batch, normalizer, settings), options)


def divided(mesh: AbstractDeviceMesh, tree: PyTree) -> PyTree:
    """Shapes of parameters that lie where a run keeps them."""

    def one(shape: Any, spec: PartitionSpec | None) -> Any:
        if spec is None:
            return shape
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=mesh.sharding(spec))

    return jax.tree.map(one, tree, mesh.specs(tree, Layout.MASTER))


def of_lesson(target: Transformer, draft: MedusaHeads, asked: argparse.Namespace, mesh: AbstractDeviceMesh) -> Program:
    """The draft's gradients on as many rows as the update has."""
    rows, width = asked.rows, asked.prompt + asked.new
    features = Features(_array((rows, width, target.hidden_size), jnp.float32), {})
    ints = _array((rows,), jnp.int32)
    batch = DraftBatch(features, _array((rows, width), jnp.int32), ints, ints)
    options = dict(
        temperature=_array(()),
        alpha=_array((draft.train_length,)),
        position_decay=_array(()),
        new=asked.new,
        mesh=mesh,
    )
    draft, target = divided(mesh, draft), divided(mesh, target)
    return Program("draft lesson", draft_gradients, (draft, target, batch, ForwardKL()), options)


def _array(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def mesh_of_run(mesh: Mesh) -> DeviceMesh:
    """The same devices as a run has them, each with a copy of the weights where rollouts are decoded."""
    return DeviceMesh(Mesh(mesh.devices.reshape(-1, 1), (DATA, MODEL)))


def programs(name: str, asked: argparse.Namespace, mesh: AbstractDeviceMesh) -> Iterator[Program]:
    target, draft = shapes_of_model(name, asked.layers)
    yield from decode_programs(
        target,
        draft,
        Block(),
        eqx.filter_eval_shape(Sampling),
        prompts=asked.devices,
        samples=asked.rows // asked.devices,
        prompt_length=asked.prompt,
        new_tokens=asked.new,
        lengths=asked.lengths,
        mesh=mesh,
    )
    yield of_update(target, asked, mesh)
    yield of_lesson(target, draft, asked, mesh)


def broken_promises(program: str, plan: Plan, asked: argparse.Namespace) -> list[str]:
    """What a program should not do, and does."""
    found = []
    if plan.host_calls:
        found.append(f"asks the host: {', '.join(plan.host_calls)}")
    collectives = {**plan.collectives, **plan.collectives_in_loop}
    if asked.devices == 1 and collectives:
        found.append(f"has collectives on one device: {collectives}")
    # With rows divided and weights whole, a round is each device's own affair.
    if program.startswith("segment") and plan.collectives_in_loop:
        found.append(f"has collectives in a round: {plan.collectives_in_loop}")
    if program.startswith("segment"):
        # A TPU lays the values of small heads out otherwise between programs, so it turns them once a segment.
        copies = plan.copies if plan.kernels is not None else plan.copies_in_loop
        rows_of_cache = [shape for shape in copies if _is_cache(shape, asked)]
        if rows_of_cache:
            found.append(f"copies a cache: {', '.join(rows_of_cache)}")
        launched, buffered = plan.kernels_in_loop or 0, plan.kernels_in_loop_buffered or 0
        if buffered < launched - 2:  # the loop's own counter and its condition
            found.append(f"has {launched - buffered} kernels a round outside of buffers")
        if plan.alias_bytes < 0.99 * plan.output_bytes:
            found.append(f"keeps {plan.output_bytes - plan.alias_bytes} bytes of its state twice")
    if plan.bytes > memory_of(asked.target):
        found.append(f"needs {plan.bytes / 2**30:.1f} GiB of {memory_of(asked.target) / 2**30:.1f}")
    # Each device gathers weights and keeps its part of the gradients; hidden states and logits stay where they are.
    wrong = {kind for kind in collectives if kind not in ("all-gather", "reduce-scatter", "all-reduce")}
    if not program.startswith("segment") and wrong:
        found.append(f"moves what is a device's own: {', '.join(sorted(wrong))}")
    return found


def _is_cache(shape: str, asked: argparse.Namespace) -> bool:
    sizes = [int(size) for size in shape.partition("[")[2].rstrip("]").split(",") if size]
    return len(sizes) == 4 and max(sizes) >= asked.new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu_plan.json")
    parser.add_argument("--target", choices=TARGETS, default="h200")
    parser.add_argument("--models", default="smollm2-135m,qwen3-1.7b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=2048, help="tokens of a completion")
    parser.add_argument("--lengths", default=f"0,{DRAFT_LENGTH}", help="tokens drafted a round")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--keep-all", action="store_true", help="an update without gradient checkpointing")
    parser.add_argument("--layers", type=int, help="of each model; a few show what a layer compiles to")
    parser.add_argument("--only", help="programs whose name contains this")
    parser.add_argument("--check", action="store_true", help="two layers; exit code 1 if a promise is broken")
    asked = parser.parse_args()
    asked.lengths = whole_numbers("--lengths", asked.lengths)
    unknown = [name for name in asked.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"--models takes {', '.join(MODELS)}, not {', '.join(unknown)}")
    if asked.rows % asked.devices:
        parser.error(f"--rows {asked.rows} has to be a multiple of --devices {asked.devices}")
    if asked.check and asked.layers is None:
        asked.layers = 2
    jax.config.update("jax_platforms", "cpu")  # the plugin looks for a driver where it may be the default
    mesh, broken, found = mesh_of(asked.target, asked.devices), [], []
    run_mesh = mesh_of_run(mesh)
    place = placed(run_mesh.mesh, asked.rows)
    jax.config.update("jax_default_device", mesh.devices.flat[0])  # what is best there is then chosen, as in a run
    is_gpu = platform_of(()) == "gpu"
    for name in asked.models.split(","):
        for program in programs(name, asked, run_mesh):
            if asked.only is not None and asked.only not in program.name:
                continue
            print(f"{name}, {program.name}: compiling ...", flush=True)
            began = time.perf_counter()
            try:
                compiled, thunks = compile_with_thunks(lambda program=program: program.lower(place), is_gpu)
            except AsksTheHost as error:
                broken.append(f"{name}, {program.name} {error}")
                print(f"  BROKEN: {error}", flush=True)
                continue
            plan = read_plan(compiled, thunks, time.perf_counter() - began)
            found.append({"model": name, "program": program.name, "bytes": plan.bytes, **plan._asdict()})
            collectives = ", ".join(
                f"{n} {kind}" for kind, n in {**plan.collectives, **plan.collectives_in_loop}.items()
            )
            kernels = "" if plan.kernels is None else f"{plan.kernels} kernels and {plan.kernels_in_loop} a round, "
            kernels += f"{plan.kernels_in_loop_buffered} of these in command buffers; " if kernels else ""
            print(
                f"  {plan.bytes / 2**30:.2f} GiB, {plan.temporary_bytes / 2**30:.2f} of them temporary; {kernels}"
                f"collectives: {collectives or 'none'}; large copies: {sum(plan.copies.values())}; "
                f"{plan.seconds:.0f} s",
                flush=True,
            )
            for what in broken_promises(program.name, plan, asked):
                broken.append(f"{name}, {program.name} {what}")
                print(f"  BROKEN: {what}", flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items()}
    result = {"about": machine(), "asked": said, "collectives": COLLECTIVES, "programs": found, "broken": broken}
    (asked.out / "gpu_plan.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if broken and asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
