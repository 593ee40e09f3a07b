"""Tokens a second of plain and speculative decoding, for several batch sizes and draft lengths.

    python benchmarks/rollout.py --model runs/default/policy --draft runs/default/draft --rows 8,16,32 --lengths 1,2,3

Everything runs interleaved in one process on the same prompts; medians of several rounds, compilation left out. Sampled
completions differ in length, so time is taken per token. Prints a table, and one JSON object with `--json`.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr

from eqx_specgrpo.decoding import FixedLength, Prompts, Sampling, decode
from eqx_specgrpo.drafts import NoDraft, load_draft
from eqx_specgrpo.models import cast_weights, load_pretrained
from eqx_specgrpo.tasks import load_task


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="folder, .gguf file or org/name")
parser.add_argument("--draft", required=True, help="folder of a saved draft")
parser.add_argument(
    "--task", default='{"name": "arithmetic", "terms": [5, 7], "low": 2, "high": 20, "operations": "+-"}'
)
parser.add_argument("--rows", type=numbers, default=[8, 16, 32])
parser.add_argument("--lengths", type=numbers, default=[1, 2, 3])
parser.add_argument("--samples", type=int, default=8, help="rows a prompt")
parser.add_argument("--new", type=int, default=128)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
parser.add_argument("--json", action="store_true")
arguments = parser.parse_args()

target, tokenizer = load_pretrained(arguments.model)
draft = load_draft(Path(arguments.draft), target)
target, draft = (cast_weights(module, jnp.dtype(arguments.dtype)) for module in (target, draft))
options = json.loads(arguments.task)
task = load_task(options.pop("name"), 0, options)


def measure(rows: int, length: int, seed: int) -> tuple[float, float]:
    """Tokens a second, and the acceptance length."""
    prompts = [tokenizer.encode_prompt(task.at(i).prompt) for i in range(rows // arguments.samples)]
    start = time.perf_counter()
    rollouts = decode(
        target,
        Prompts.from_lists(prompts, multiple_of=32),
        draft=draft if length else NoDraft(),
        length=FixedLength(length),
        sampling=Sampling(arguments.temperature),
        key=jr.key(seed),
        max_new_tokens=arguments.new,
        eos_ids=tokenizer.eos_ids,
        samples=arguments.samples,
    )
    return float(rollouts.lengths.sum()) / (time.perf_counter() - start), rollouts.statistics.acceptance_length


results = []
for rows in arguments.rows:
    if rows % arguments.samples:
        raise SystemExit(f"--rows {rows} is no multiple of --samples {arguments.samples}")
    lengths = [0, *arguments.lengths]
    for length in lengths:
        measure(rows, length, seed=0)  # compiles
    found = {length: [] for length in lengths}
    for seed in range(1, arguments.rounds + 1):
        for length in lengths:
            found[length].append(measure(rows, length, seed))
    plain = statistics.median(rate for rate, _ in found[0])
    for length in lengths:
        rate = statistics.median(rate for rate, _ in found[length])
        acceptance = statistics.mean(accepted for _, accepted in found[length])
        results.append(
            {"rows": rows, "length": length, "tokens_per_second": rate, "ratio": rate / plain, "acceptance": acceptance}
        )
        if not arguments.json:
            print(
                f"rows {rows}  length {length}  {rate:.0f} tokens/s  {rate / plain:.2f}x  acceptance {acceptance:.2f}"
            )
if arguments.json:
    about = {"jax": jax.__version__, "device": str(jax.devices()[0]), "machine": platform.machine()}
    print(json.dumps({"settings": vars(arguments), "about": about, "results": results}))
