"""The parts of `gpu.py`: each measures one thing on the device that JAX has, and returns what goes into the JSON."""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from gpu_plan import MODELS, of_update
from gpu_policy import make_policy
from gpu_target import bandwidth_of
from many_sums import write_task

import eqx_specgrpo as sg
from eqx_specgrpo import Prompts, Rollouts
from eqx_specgrpo.decoding import (
    AbstractVerifier,
    Block,
    Coupled,
    FixedLength,
    Rejection,
    SegmentObservation,
    teacher_forced_logprobs,
)
from eqx_specgrpo.drafts import MedusaHeads, NoDraft, ReducedVocabulary
from eqx_specgrpo.grpo import compute_copy
from eqx_specgrpo.layout import OneDevice
from eqx_specgrpo.models import Transformer, TransformerConfig
from eqx_specgrpo.sampling import GreedySampling, Sampling
from eqx_specgrpo.tasks import Arithmetic
from eqx_specgrpo.testing import check_verifier

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is tried, on a GPU or in a test.

    **Arguments:**

    - `verifiers`: whose law is proven.
    - `dtypes`: in which tokens are compared with plain decoding's.
    - `model`: of the cost of rounds, a name of `gpu_plan.MODELS` and its number of layers.
    - `large`: of the update and its memory.
    - `rows`: that are decoded together.
    - `context`, `new`: tokens before, and decoded.
    - `update`: rows and new tokens of the large model's update.
    - `policy`: see `gpu_policy.make_policy`.
    - `run`: keys of the whole runs.
    """

    verifiers: tuple[AbstractVerifier, ...] = (Block(), Rejection(), Coupled())
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    model: tuple[str, int | None] = ("smollm2-135m", None)
    large: tuple[str, int | None] = ("qwen3-1.7b", None)
    rows: tuple[int, ...] = (1, 8, 64, 256, 512)
    context: int = 512
    new: int = 96
    update: tuple[int, int] = (16, 1024)
    policy: dict[str, Any] = dataclasses.field(
        default_factory=lambda: dict(hidden=768, layers=12, sums="2-60", longest=1536, batch=64, seconds=90.0)
    )
    run: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "steps": 6,
            "grpo.prompts_per_step": 8,
            "grpo.num_generations": 16,
            "grpo.max_completion_length": 896,
            "grpo.learning_rate": 1e-5,
            "model.dtype": "bfloat16",
        }
    )


TINY = Sizes(
    verifiers=(Coupled(),),
    dtypes=("float32",),
    model=("smollm2-135m", 1),
    large=("smollm2-135m", 1),
    rows=(1, 2),
    context=32,
    new=8,
    update=(2, 16),
    policy=dict(hidden=64, layers=1, sums="1-3", longest=128, batch=2, seconds=0.2),
    run={
        "steps": 1,
        "grpo.prompts_per_step": 1,
        "grpo.num_generations": 2,
        "grpo.max_completion_length": 8,
        "draft.warmup": 1,
    },
)


def exactness(sizes: Sizes, folder: Path, say: Say) -> dict[str, Any]:
    """Whether speculation is lossless on this device: the law, tokens beside plain decoding's, log-probabilities beside
    the trainer's."""
    del folder
    found: dict[str, Any] = {"law": {}, "models": {}}
    for verifier in sizes.verifiers:
        name = type(verifier).__name__
        found["law"][name] = dataclasses.asdict(check_verifier(verifier, lengths=(2,)))
        say(f"law of {name}: {found['law'][name]}")
    whole, tokenizer = sg.load_pretrained(sg.default_model_path())
    trained = sg.load_draft(sg.default_draft_path(), whole)
    task = Arithmetic(seed=0, terms=(5, 7), low=2, high=20, operations="+-")
    prompts = [tokenizer.encode_prompt(task.example(index).prompt) for index in range(4)]
    for dtype in sizes.dtypes:
        target, draft = compute_copy(whole, dtype), compute_copy(trained, dtype)

        def go(draft, sampling, verifier, new=64, target=target) -> Rollouts:
            return sg.decode(
                target, prompts, draft=draft, length=FixedLength(3 if isinstance(draft, MedusaHeads) else 0),
                sampling=sampling, verifier=verifier, key=jr.key(1), max_new_tokens=min(new, 4 * sizes.new),
                eos_ids=tokenizer.eos_ids, samples=4, smallest_bucket=16,
            )  # fmt: skip

        record: dict[str, Any] = {}
        for name, sampling, verifier in (("greedy", GreedySampling(), None), ("coupled", Sampling(), Coupled())):
            plain, guessed = go(NoDraft(), sampling, verifier), go(draft, sampling, verifier)
            other = (plain.tokens != guessed.tokens).any(axis=1) | (plain.lengths != guessed.lengths)
            record[name] = {
                "rows": len(other),
                "rows_that_differ": int(other.sum()),
                "acceptance_length": guessed.statistics.acceptance_length,
            }
        sampled = go(draft, Sampling(), None)
        counts = np.arange(sampled.tokens.shape[1])[None] < sampled.lengths[:, None]
        gap = np.abs(teacher_forced_logprobs(target, Sampling(), sampled) - sampled.logprobs)[counts]
        record["logprob_gap"] = {"mean": float(gap.mean()), "max": float(gap.max())}
        found["models"][dtype] = record
        say(f"{dtype}: {record}")
    return found


def rollouts(sizes: Sizes, folder: Path, say: Say) -> dict[str, Any]:
    """Milliseconds of a round by rows, plain and with three guesses, and the share of the memory's bandwidth."""
    del folder
    target = _random_model(*sizes.model, "bfloat16")
    weights = sum(x.nbytes for x in jax.tree.leaves(eqx.filter(target, eqx.is_inexact_array)))
    bandwidth, found = bandwidth_of(jax.devices()[0].device_kind), []
    for rows in sizes.rows:
        for length in (0, 3):
            seconds = _round_seconds(target, rows, sizes.context, sizes.new, length)
            read = weights + rows * _cache_bytes(target.config, sizes.context)
            record = {
                "rows": rows,
                "length": length,
                "milliseconds": None if seconds is None else 1000 * seconds,
                "bytes_read": read,
                "share_of_bandwidth": None if seconds is None or bandwidth is None else read / seconds / bandwidth,
            }
            found.append(record)
            say(str(record))
    return {"model": sizes.model, "weights_bytes": weights, "rounds": found}


def large(sizes: Sizes, folder: Path, say: Say) -> dict[str, Any]:
    """An update of a large model with LoRA, and its rollout: seconds, and peak memory beside the compiler's plan."""
    del folder
    shapes_of_target = _shapes(*sizes.large, "bfloat16")
    rows, new = sizes.update
    asked = argparse.Namespace(rows=rows, new=new, prompt=128, devices=1, lora_rank=16, keep_all=False)
    program = of_update(shapes_of_target, asked, OneDevice())
    before = _peak()
    compiled = program.lower().compile()
    needs: Any = compiled.memory_analysis()
    # Of what the program takes, arrays are its arguments; all else is part of it.
    shapes = eqx.filter((*program.arguments, program.options), _is_shape)
    dynamic = jax.tree.map(_random, shapes)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*dynamic))
        seconds.append(time.perf_counter() - began)
    found = {
        "update_seconds": seconds,
        "planned_temporary_bytes": needs.temp_size_in_bytes,
        "planned_bytes": needs.argument_size_in_bytes + needs.output_size_in_bytes + needs.temp_size_in_bytes,
        "peak_bytes_before": before,
        "peak_bytes": _peak(),
    }
    say(f"update: {found}")
    del dynamic
    target = jax.tree.map(_random, shapes_of_target)
    found["plain_round_seconds"] = _round_seconds(target, rows, 128, sizes.new, 0)
    say(f"a plain round of {rows} rows: {found['plain_round_seconds']} s")
    return {"model": sizes.large, "rows": rows, "new": new, **found}


def runs(sizes: Sizes, folder: Path, say: Say) -> dict[str, Any]:
    """A policy pretrained on the spot, and `specgrpo run` with it, plain and speculative."""
    policy, task = folder / "policy", folder / "sums.jsonl"
    made = make_policy(policy, **sizes.policy, say=say)
    write_task(task, 200, sizes.policy["sums"], 12)
    found: dict[str, Any] = {"policy": made}
    for name, kind in (("plain", "none"), ("speculative", "medusa")):
        out = folder / name
        keys = {**sizes.run, "draft.kind": kind, "task.name": str(task), "model.path": str(policy), "out": str(out)}
        if kind == "none":
            keys.pop("draft.warmup", None)
        sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        reward = f"{Path(__file__).parent / 'many_sums.py'}:sums_right"
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", "from eqx_specgrpo.cli import app; app()", "run", "--reward", reward, *sets],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the {name} run ended with {done.returncode}: {done.stderr[-2000:]}")
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        wanted = ("reward", "completions/mean_length", "time/rollout", "time/step", "draft/acceptance_length")
        steps = [{key: step[key] for key in wanted if key in step} for step in map(json.loads, lines)]
        record = {"seconds": time.perf_counter() - began, "steps": steps}
        found[name] = record
        say(f"{name}: {record}")
    return found


PARTS: dict[str, Callable[[Sizes, Path, Say], dict[str, Any]]] = {
    "exactness": exactness,
    "rollouts": rollouts,
    "runs": runs,
    "large": large,
}


def _shapes(name: str, layers: int | None, dtype: str) -> Transformer:
    config = MODELS[name] if layers is None else dataclasses.replace(MODELS[name], num_layers=layers)
    return eqx.filter_eval_shape(lambda: compute_copy(Transformer(config, key=jr.key(0)), dtype))


def _random_model(name: str, layers: int | None, dtype: str) -> Transformer:
    """Made on the device in the dtype it computes in: the float32 weights of a large one need not fit."""
    return jax.tree.map(_random, _shapes(name, layers, dtype))


def _random(shape: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jnp.inexact):
        return _normal(shape.shape, jnp.dtype(shape.dtype).name)
    # Lengths and tokens alike: any that are allowed.
    return jnp.full(shape.shape, 16 if shape.dtype == jnp.int32 else 1, shape.dtype)


@eqx.filter_jit
def _normal(shape: tuple[int, ...], dtype: str) -> jax.Array:
    return 0.02 * jr.normal(jr.key(len(shape)), shape, dtype)


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _cache_bytes(config: TransformerConfig, context: int) -> int:
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * context


def _round_seconds(target: Transformer, rows: int, context: int, new: int, length: int) -> float | None:
    """The median over segments; `None` where all of them compiled."""
    tokens = np.random.default_rng(1).integers(0, target.vocab_size, (rows, context), dtype=np.int32)
    prompts = Prompts(tokens, np.full(rows, context, np.int32))
    # Heads that know few tokens cost next to nothing; they are seldom right, but a round costs what it costs.
    few = ReducedVocabulary(jnp.arange(256))
    draft = MedusaHeads.fresh(target.hidden_size, length, few) if length else NoDraft()
    found: list[float] = []

    def see(observation: SegmentObservation, _: Any) -> None:
        if observation.seconds is not None:
            found.append(observation.seconds / observation.rounds)

    for _ in range(2):
        sg.decode(
            target, prompts, draft=draft, length=FixedLength(length), key=jr.key(2), max_new_tokens=new,
            smallest_bucket=rows, on_segment=see,
        )  # fmt: skip
    return statistics.median(found) if found else None


def _peak() -> int | None:
    statistics_ = jax.devices()[0].memory_stats()
    return None if statistics_ is None else statistics_.get("peak_bytes_in_use")
