"""Updates of long traces: what they need of memory and time, and how exact they are. `scaling.py` has the commands.

    python benchmarks/scaling.py memory --out results/memory     # bytes of an update by length, and their estimate
    python benchmarks/scaling.py time --out results/time         # seconds of an update a token, by length
    python benchmarks/scaling.py parity --out results/parity     # 2,048 positions of every family beside transformers
    python benchmarks/scaling.py gap --out results/gap           # decoder's and trainer's log-probabilities by position
    python benchmarks/scaling.py update --out results/update     # one whole update of 4 rows of 8,192 tokens of SmolLM2
    python benchmarks/scaling.py run --out results/run           # `specgrpo run` with SmolLM2 and room for 4,096 tokens

Each writes a JSON file with the name of the command into `--out`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqx_specgrpo import Prompts, Rollouts
from eqx_specgrpo._types import DecodeStatistics, ScoredRollouts
from eqx_specgrpo.bench import whole_numbers
from eqx_specgrpo.config import DraftConfig, GRPOConfig, ModelConfig, RunConfig, load_policy, make_parts
from eqx_specgrpo.decoding import FixedLength, decode
from eqx_specgrpo.drafts import NoDraft
from eqx_specgrpo.grpo import (
    LossNormalizer,
    LossSettings,
    UpdateBatch,
    UpdateBudget,
    choose_update,
    compute_copy,
    policy_gradients,
    policy_logprobs,
    update_bytes,
)
from eqx_specgrpo.models import Transformer, TransformerConfig, load_model, sequence_features
from eqx_specgrpo.records import machine
from eqx_specgrpo.runtime import Memory, device_memory
from eqx_specgrpo.sampling import Sampling
from eqx_specgrpo.train import RunState, UpdatePlanner, update_policy

TESTS = Path(__file__).parent.parent / "tests"
PROMPT = 128
GIB = 2**30


def smollm2_like(vocab: int, dtype: str) -> Transformer:
    """SmolLM2-135M's sizes but for the vocabulary, all zeros: for what does not depend on values."""
    config = TransformerConfig(
        vocab_size=vocab,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=1 << 16,
        tie_embeddings=True,
    )
    shapes = eqx.filter_eval_shape(compute_copy, eqx.filter_eval_shape(Transformer, config, key=jr.key(0)), dtype)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, shapes)


def made_batch(rows: int, new: int, vocab: int) -> UpdateBatch:
    """Random tokens behind one prompt."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, PROMPT + new), dtype=np.int32)
    tokens[:, :PROMPT] = tokens[:1, :PROMPT]
    return UpdateBatch(
        tokens=tokens,
        prompt_lengths=np.full(rows, PROMPT, np.int32),
        completion_tokens=tokens[:, PROMPT:],
        completion_mask=np.ones((rows, new), bool),
        old_logprobs=np.full((rows, new), -np.log(vocab), np.float32),
        advantages=rng.standard_normal(rows).astype(np.float32),
        prompt_rows=np.zeros(1, np.int32),
        prompt_of_row=np.zeros(rows, np.int32),
        completion_lengths=np.full(rows, new, np.int32),
    )


def normalizer_of(batch: UpdateBatch) -> LossNormalizer:
    mask = np.asarray(batch.completion_mask)
    return LossNormalizer.from_mask(mask, mask.shape[1], num_micro_batches=1)


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the compiled update needs besides weights and gradients, as it is chosen on this machine and otherwise."""
    model = smollm2_like(arguments.vocab, arguments.dtype)
    weights = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    there = device_memory() if arguments.gib is None else Memory(*(2 * [int(arguments.gib * GIB)]), is_shared=True)
    budget = None if there is None else UpdateBudget.of(there, 20 * weights)
    found = []
    for shape in arguments.shapes.split(","):
        rows, new = (int(number) for number in shape.split("x"))
        positions, batch = rows * new + PROMPT, made_batch(rows, new, arguments.vocab)
        choice = choose_update(model, positions, budget, dtype=arguments.dtype, chunk=512)
        record: dict[str, Any] = {"rows": rows, "new": new, "chosen": choice.gradient_checkpointing}
        for again in (True, False) if arguments.both else (choice.gradient_checkpointing,):
            settings = LossSettings(gradient_checkpointing=again)
            began = time.process_time()
            compiled = policy_gradients.lower(model, batch, normalizer_of(batch), settings).compile()
            name = "checkpointed" if again else "kept"
            record[name] = {
                "bytes": compiled.compiled.memory_analysis().temp_size_in_bytes,
                "estimate": update_bytes(model, positions, chunk=512, gradient_checkpointing=again),
                "compile_processor_seconds": time.process_time() - began,
            }
            of = record[name]
            print(
                f"{shape} {name}: {of['bytes'] / GIB:.2f} GiB, by the estimate {of['estimate'] / GIB:.2f}", flush=True
            )
        found.append(record)
    return {"memory": None if there is None else there._asdict(), "weights": weights, "updates": found}


def seconds(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of an update as it is chosen, by length, in turn."""
    model = smollm2_like(arguments.vocab, arguments.dtype)
    # Weights and tokens do not matter, but zeros might be multiplied faster.
    model = jax.tree.map(
        lambda x: 0.02 * jr.normal(jr.key(x.size), x.shape, x.dtype) if eqx.is_inexact_array(x) else x, model
    )
    there = device_memory()
    weights = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    budget = None if there is None else UpdateBudget.of(there, 20 * weights)
    found: dict[int, dict[str, list[float]]] = {}
    lengths = whole_numbers("--lengths", arguments.lengths)
    for turn in range(arguments.rounds + 1):
        for new in lengths:
            rows = max(1, arguments.tokens // new)
            choice = choose_update(model, rows * new + PROMPT, budget, dtype=arguments.dtype, chunk=512)
            settings = LossSettings(gradient_checkpointing=choice.gradient_checkpointing)
            batch = made_batch(rows, new, arguments.vocab)
            began, worked = time.perf_counter(), time.process_time()
            jax.block_until_ready(policy_gradients(model, batch, normalizer_of(batch), settings)[0].loss)
            if turn:  # the first compiles
                of = found.setdefault(new, {"seconds": [], "processor_seconds": []})
                of["seconds"].append(time.perf_counter() - began)
                of["processor_seconds"].append(time.process_time() - worked)
                print(
                    f"{rows} x {new}: {of['seconds'][-1]:.1f} s, processor {of['processor_seconds'][-1]:.1f}",
                    flush=True,
                )
    rows_of = {new: max(1, arguments.tokens // new) for new in lengths}
    per_token = {new: statistics.median(of["processor_seconds"]) / new / rows_of[new] for new, of in found.items()}
    return {
        "updates": [{"rows": rows_of[new], "new": new, **of} for new, of in found.items()],
        "processor_seconds_a_token_over_the_first": {new: s / per_token[lengths[0]] for new, s in per_token.items()},
    }


def parity(arguments: argparse.Namespace) -> dict[str, Any]:
    """The greatest gap of float32 log-probabilities to transformers', in float32 and in float64, for every family.

    Far along a sequence the last bit of a rotary frequency shows. Ours are rounded once, from float64, and theirs are
    float32 all through: so also beside their model with our frequencies.
    """
    sys.path.insert(0, str(TESTS))
    from make_reference import CONFIGS, VOCAB, random_model, reference_logprobs, take_frequencies

    @eqx.filter_jit
    def logprobs(model: Transformer, tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(model.unembed(sequence_features(model, tokens).last))

    tokens = np.random.default_rng(5).integers(0, VOCAB, (1, arguments.positions), dtype=np.int32)
    gaps = {}
    for name in CONFIGS:
        theirs = random_model(name, seed=77, max_position_embeddings=2 * arguments.positions)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = load_model(Path(folder))
        found = np.asarray(logprobs(ours, jnp.asarray(tokens)))
        single, double = reference_logprobs(theirs, tokens), reference_logprobs(theirs.double(), tokens)
        take_frequencies(theirs, ours)
        same = reference_logprobs(theirs, tokens)
        pairs = {"to_float32": (found, single), "to_float64": (found, double), "theirs_to_float64": (single, double)}
        pairs["to_float64_with_our_frequencies"] = (found, same)
        gaps[name] = {which: float(np.abs(a - b).max()) for which, (a, b) in pairs.items()}
        print(f"{name}: " + ", ".join(f"{which} {gap:.1e}" for which, gap in gaps[name].items()), flush=True)
    return {"positions": arguments.positions, "greatest_gap": gaps}


def find_smollm2() -> Path:
    sys.path.insert(0, str(TESTS))
    from smollm2 import find_gguf  # pyright: ignore[reportMissingImports]

    return find_gguf()


def gap(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of what the decoder said of each of its tokens and what the update's forward says, by position."""
    policy, tokenizer = load_policy(str(find_smollm2()))
    ids = tokenizer.encode_prompt("Write a very long story about a lighthouse, with many chapters.")
    new = min(arguments.positions, policy.max_length) - len(ids)
    records = []
    for dtype in arguments.dtypes.split(","):
        target = compute_copy(policy, dtype)
        began = time.perf_counter()
        rollouts = decode(
            target, [ids], draft=NoDraft(), length=FixedLength(0), sampling=Sampling(jnp.float32(1.0)), key=jr.key(1),
            max_new_tokens=new, eos_ids=(), samples=arguments.rows, smallest_bucket=arguments.rows,
        )  # fmt: skip
        took = time.perf_counter() - began
        rows, width = arguments.rows, len(ids)
        tokens = np.zeros((rows, width + new), np.int32)
        tokens[:, :width], tokens[:, width:] = ids, rollouts.tokens
        batch = UpdateBatch(
            tokens, np.full(rows, width, np.int32), tokens[:, width:], np.ones((rows, new), bool),
            rollouts.logprobs.astype(np.float32), np.zeros(rows, np.float32), np.zeros(1, np.int32),
            np.zeros(rows, np.int32), completion_lengths=np.full(rows, new, np.int32),
        )  # fmt: skip
        logprobs = np.asarray(policy_logprobs(target, batch, LossSettings(gradient_checkpointing=True)))
        gaps = np.abs(logprobs - rollouts.logprobs)
        edges = [0, *(edge for edge in (64, 128, 256, 512, 1024, 2048, 4096) if edge < new), new]
        record = {
            "dtype": dtype,
            "rows": rows,
            "new": new,
            "rollout_seconds": took,
            "entropy_like": float(-logprobs.mean()),
            "by_position": [
                {
                    "from": start,
                    "to": stop,
                    "mean": float(gaps[:, start:stop].mean()),
                    "p99": float(np.quantile(gaps[:, start:stop], 0.99)),
                    "max": float(gaps[:, start:stop].max()),
                }
                for start, stop in zip(edges, edges[1:], strict=False)
            ],
        }
        for part in record["by_position"]:
            print(f"{dtype} {part['from']}-{part['to']}: mean {part['mean']:.1e}, max {part['max']:.1e}", flush=True)
        records.append(record)
    return {"gaps": records}


def draw_gap(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for of in record["gaps"]:
        middle = [0.5 * (part["from"] + part["to"]) for part in of["by_position"]]
        for key, style in (("mean", "o-"), ("max", "o:")):
            axes.plot(middle, [part[key] for part in of["by_position"]], style, label=f"{of['dtype']}, {key}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("position in the completion")
    axes.set_ylabel("gap of log-probabilities, nats")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def update(arguments: argparse.Namespace) -> dict[str, Any]:
    """One step of SmolLM2 on made rollouts, with the defaults: gradients, optimizer, metrics."""
    path = find_smollm2()
    config = RunConfig(
        model=ModelConfig(path=str(path), dtype=arguments.dtype),
        grpo=GRPOConfig(num_generations=arguments.rows, prompts_per_step=1, max_completion_length=arguments.new),
        draft=DraftConfig(kind="none"),
    )
    policy, tokenizer = load_policy(str(path))
    parts = make_parts(config, tokenizer, NoDraft())
    prompts = Prompts.from_lists([tokenizer.encode_prompt("What is 12 + 30?")], multiple_of=32)
    rows, new = arguments.rows, min(arguments.new, policy.max_length - int(prompts.lengths[0]))
    rng = np.random.default_rng(0)
    counts = np.zeros((rows, 1), np.int32)
    rollouts = Rollouts(
        prompts, np.zeros(rows, np.int32), rng.integers(0, 49000, (rows, new), dtype=np.int32),
        np.full(rows, new, np.int32), np.full((rows, new), -10.0), np.zeros(rows, np.int32),
        DecodeStatistics(counts[:, 0], counts, counts, counts[:, 0]), None,
    )  # fmt: skip
    rewards = np.arange(rows, dtype=np.float64)
    scored = ScoredRollouts(rollouts, rewards[:, None], rewards, rewards - rewards.mean())
    state = RunState.fresh(policy, NoDraft(), parts.policy_optimizer, parts.draft_optimizer)
    said: list[str] = []
    planner = UpdatePlanner(device_memory(), lambda text: (said.append(text), print(text, flush=True))[0])
    began, worked = time.perf_counter(), time.process_time()
    done = update_policy(parts, state.policy, state.policy_optimizer, None, scored, 1e-6, 0, planner=planner)
    return {
        "rows": rows,
        "new": new,
        "plan": said,
        "seconds_with_compilation": time.perf_counter() - began,
        "processor_seconds_with_compilation": time.process_time() - worked,
        "peak_gib_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "metrics": done.metrics,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """`specgrpo run` with a limit of each length, in a process of its own: its peak memory, and what it said."""
    records = []
    for limit in whole_numbers("--limits", arguments.limits):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = ["specgrpo", "run", "--model", str(find_smollm2()), "--out", str(out)]
            settings = {
                "steps": arguments.steps,
                "grpo.prompts_per_step": 2,
                "grpo.num_generations": 4,
                "grpo.max_completion_length": limit,
            }
            for name, value in settings.items():
                command += ["--set", f"{name}={value}"]
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line.rstrip())
                print(said[-1], flush=True)
            _, status, usage = os.wait4(process.pid, 0)
            metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        wanted = ("completions/max_length", "time/rollout", "time/update", "time/draft", "time/step", "compile/count")
        records.append(
            {
                "limit": limit,
                "status": os.waitstatus_to_exitcode(status),
                "seconds": time.perf_counter() - began,
                "peak_gib_of_the_process": usage.ru_maxrss / 2**20,
                "plan": [line.strip() for line in said if "micro-batches" in line],
                "steps": [{name: record[name] for name in wanted if name in record} for record in metrics],
            }
        )
        print(f"limit {limit}: {records[-1]['peak_gib_of_the_process']:.2f} GiB", flush=True)
    return {"runs": records}


COMMANDS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "memory": memory, "time": seconds, "parity": parity, "gap": gap, "update": update, "run": run,
}  # fmt: skip


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scaling.py", description="Updates of long traces.")
    commands = parser.add_subparsers(dest="command", required=True)
    by_name = {name: commands.add_parser(name, help=call.__doc__) for name, call in COMMANDS.items()}
    for command in by_name.values():
        command.add_argument("--out", type=Path, required=True, help="folder of the results")
        command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    by_name["memory"].add_argument("--shapes", default="1x1024,1x2048,1x4096,1x8192,1x16384,4x2048", help="rows x new")
    by_name["memory"].add_argument("--gib", type=float, help="as if this machine had so much memory, all of it free")
    by_name["memory"].add_argument("--both", action="store_true", help="with and without checkpointing")
    by_name["time"].add_argument("--lengths", default="1024,2048,4096,8192")
    by_name["time"].add_argument("--tokens", type=int, default=1, help="as many rows as make up so many tokens; or one")
    by_name["time"].add_argument("--rounds", type=int, default=3)
    for name in ("memory", "time"):
        by_name[name].add_argument("--vocab", type=int, default=16384)
    by_name["parity"].add_argument("--positions", type=int, default=2048)
    by_name["gap"].add_argument("--positions", type=int, default=8192)
    by_name["gap"].add_argument("--rows", type=int, default=2)
    by_name["gap"].add_argument("--dtypes", default="float32,bfloat16")
    by_name["update"].add_argument("--rows", type=int, default=4)
    by_name["update"].add_argument("--new", type=int, default=8192)
    by_name["run"].add_argument("--limits", default="512,4096", help="grpo.max_completion_length")
    by_name["run"].add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    asked = {key: value for key, value in vars(arguments).items() if key != "out"}
    record = {"about": machine(), "asked": asked, **COMMANDS[arguments.command](arguments)}
    (arguments.out / f"{arguments.command}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    if arguments.command == "gap":
        draw_gap(record, arguments.out / "gap.png")
    return 0
