"""How the cost of a token grows with rows, context, vocabulary and model size, and what the update needs of memory.

    python benchmarks/scaling.py --out results/scaling
    python benchmarks/scaling.py --out results/scaling --dtype bfloat16 --rows 64,128,256,512 --contexts 512,2048,8192
    python benchmarks/scaling.py --out results/scaling --max-new-tokens 512,8192

Models have random weights, and no row ends. One of the four is varied at a time, the others stay at the value that is
second in its list. A round of plain decoding is measured, and one that checks `--length` guesses of a draft next to
free: their ratio is how many tokens such a round has to yield to be worth it. The update's memory is what the compiler
says it needs besides weights and gradients. Writes `scaling.json`, `scaling.md` and `scaling.png`.

With `--max-new-tokens` only what these limits cost is measured, for 16 rows that end at 300 tokens: a process for each
limit, so that each has a peak of its own. Writes `room.json`.
Further commands, `memory`, `time`, `parity`, `gap`, `update` and `run`, measure updates of long traces: see
`long_updates.py`, where they are.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import long_updates
import numpy as np
from rich.console import Console

from eqx_specgrpo import Prompts
from eqx_specgrpo.bench import whole_numbers
from eqx_specgrpo.decoding import FixedLength, SegmentObservation, decode
from eqx_specgrpo.drafts import MedusaHeads, NoDraft, ReducedVocabulary
from eqx_specgrpo.grpo import LossNormalizer, LossSettings, UpdateBatch, compute_copy, policy_gradients
from eqx_specgrpo.models import Transformer, TransformerConfig
from eqx_specgrpo.records import RunProgress, machine
from eqx_specgrpo.runtime import keep_freed_memory

# Hidden size and layers; the last one is SmolLM2-135M's.
SIZES = {"4 x 128": (128, 4), "8 x 256": (256, 8), "12 x 512": (512, 12), "30 x 576": (576, 30)}
HEAD_DIM = 64
NEW = 64  # tokens that are decoded, with whatever went before


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of a token, and memory of the update.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rows", default="1,16,4,64")
    parser.add_argument("--contexts", default="64,256,1024,4096", help="tokens before those that are decoded")
    parser.add_argument("--vocabs", default="1024,16384,49152,151936")
    parser.add_argument("--sizes", default=",".join(SIZES), help="layers x hidden size, of these")
    parser.add_argument("--length", type=int, default=3, help="tokens guessed a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--max-new-tokens", help="limits that rows do not come to; measures nothing else")
    return parser.parse_args()


def room(limits: list[int], out: Path) -> None:
    """What a limit costs that no row comes to."""
    found = []
    for limit in limits:
        command = [sys.executable, str(Path(__file__).with_name("room.py")), f"--max-new-tokens={limit}"]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(found[-1], flush=True)
    text = json.dumps({"machine": machine(), "limits": found}, indent=1)
    (out / "room.json").write_text(text + "\n")


def make_model(size: str, vocab: int, context: int) -> Transformer:
    hidden, layers = SIZES[size]
    heads = max(2, hidden // HEAD_DIM)
    config = TransformerConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 64 * 64,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 3 if heads % 3 == 0 else heads // 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=context + 4 * NEW,
        tie_embeddings=True,
    )
    return Transformer(config, key=jr.key(0))


def seconds_per_round(target: Transformer, rows: int, context: int, length: int) -> float | None:
    """Median over the segments of one decoding, or `None` if all of them compiled."""
    prompts = Prompts(
        np.asarray(jr.randint(jr.key(1), (rows, context), 0, target.vocab_size)), np.full(rows, context, np.int32)
    )
    # Heads that know few tokens cost next to nothing; they are seldom right, but a round costs what it costs.
    few = ReducedVocabulary(jnp.arange(256))
    draft = MedusaHeads.fresh(target.hidden_size, length, few) if length else NoDraft()
    found: list[float] = []

    def see(observation: SegmentObservation, _: Any) -> None:
        if observation.seconds is not None and observation.rows == rows:
            found.append(observation.seconds / observation.rounds)

    decode(
        target, prompts, draft=draft, length=FixedLength(length), key=jr.key(2),
        max_new_tokens=NEW, smallest_bucket=rows, on_segment=see,
    )  # fmt: skip
    return statistics.median(found) if found else None


def decoding(size: str, vocab: int, context: int, rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain rounds and rounds with guesses, in turn."""
    target = compute_copy(make_model(size, vocab, context), arguments.dtype)
    seconds: dict[int, list[float]] = {0: [], arguments.length: []}
    for _ in range(arguments.rounds + 1):
        for length, found in seconds.items():
            value = seconds_per_round(target, rows, context, length)
            if value is not None:
                found.append(value)
    weights = sum(x.size for x in jax.tree.leaves(eqx.filter(target, eqx.is_inexact_array)))
    return {
        "size": size,
        "weights": weights,
        "vocab": vocab,
        "context": context,
        "rows": rows,
        "plain_seconds": seconds[0],
        "guessing_seconds": seconds[arguments.length],
    }


def update(size: str, vocab: int, chunk: int, checkpointing: bool, dtype: str) -> dict[str, Any]:
    """One micro-batch of 8 rows of a prompt of 128 tokens and 256 new ones: bytes, and seconds."""
    rows, prompt, new = 8, 128, 256
    model = compute_copy(make_model(size, vocab, prompt + new), dtype)
    tokens = np.random.default_rng(1).integers(0, vocab, (rows, prompt + new), dtype=np.int32)
    tokens[:, :prompt] = tokens[:1, :prompt]
    mask = np.ones((rows, new), bool)
    batch = UpdateBatch(
        tokens=tokens,
        prompt_lengths=np.full(rows, prompt, np.int32),
        completion_tokens=tokens[:, prompt:],
        completion_mask=mask,
        old_logprobs=np.full((rows, new), -np.log(vocab), np.float32),
        advantages=np.asarray(jr.normal(jr.key(2), (rows,))),
        prompt_rows=np.zeros(1, np.int32),
        prompt_of_row=np.zeros(rows, np.int32),
    )
    settings = LossSettings(chunk=chunk, gradient_checkpointing=checkpointing)
    normalizer = LossNormalizer.from_mask(mask, new, num_micro_batches=1)
    compiled = policy_gradients.lower(model, batch, normalizer, settings).compile()
    needed = compiled.compiled.memory_analysis()
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(jax.tree.leaves(compiled(model, batch, normalizer, settings)))
        found.append(time.perf_counter() - begin)
    return {
        "size": size,
        "vocab": vocab,
        "chunk": chunk,
        "checkpointing": checkpointing,
        "positions": rows * new,
        "temporary_bytes": None if needed is None else needed.temp_size_in_bytes,
        "logits_bytes": 4 * rows * new * vocab,
        "seconds": found,
    }


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    length = record["asked"]["length"]
    lines = [
        "| varied | layers x hidden | vocabulary | context | rows | plain round, ms | a token, ms "
        f"| round of {length}, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in record["decoding"]:
        plain, guessing = (1e3 * statistics.median(run[key]) for key in ("plain_seconds", "guessing_seconds"))
        lines.append(
            f"| {run['varied']} | {run['size']} | {run['vocab']} | {run['context']} | {run['rows']} | {plain:.1f} | "
            f"{plain / run['rows']:.2f} | {guessing:.1f} | {guessing / plain:.2f} |"
        )
    lines += [
        "",
        "| layers x hidden | vocabulary | chunk | checkpointing | memory, MiB | logits alone, MiB | s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in record["update"]:
        memory = "" if run["temporary_bytes"] is None else f"{run['temporary_bytes'] / 2**20:.0f}"
        chunk = "all" if run["chunk"] >= run["positions"] else run["chunk"]
        lines.append(
            f"| {run['size']} | {run['vocab']} | {chunk} | {'yes' if run['checkpointing'] else 'no'} | {memory} | "
            f"{run['logits_bytes'] / 2**20:.0f} | {statistics.median(run['seconds']):.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    runs, length = record["decoding"], record["asked"]["length"]
    varied = list(dict.fromkeys(run["varied"] for run in runs))
    figure = Figure(figsize=(3.0 * len(varied), 3.2), layout="constrained")
    panels = figure.subplots(1, len(varied), sharey=True)
    for axes, what in zip(panels, varied, strict=True):
        chosen = sorted((run for run in runs if run["varied"] == what), key=lambda run: run[_FIELD[what]])
        for key, label in (("plain_seconds", "plain"), ("guessing_seconds", f"checking {length} guesses")):
            times = [1e3 * statistics.median(run[key]) for run in chosen]
            axes.plot([run[_FIELD[what]] for run in chosen], times, "o-", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(what)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("a round, ms")
    panels[0].legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


_FIELD = {"rows": "rows", "context": "context", "vocabulary": "vocab", "weights": "weights"}


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.max_new_tokens is not None:
        room(whole_numbers("--max-new-tokens", arguments.max_new_tokens), arguments.out)
        return 0
    rows, contexts, vocabs = (
        whole_numbers(f"--{name}", getattr(arguments, name)) for name in ("rows", "contexts", "vocabs")
    )
    sizes = arguments.sizes.split(",")
    if unknown := set(sizes) - set(SIZES):
        raise SystemExit(f"--sizes {', '.join(unknown)}: choose among {', '.join(SIZES)}")
    base = {"size": sizes[1 % len(sizes)], "vocab": vocabs[1 % len(vocabs)], "context": contexts[1 % len(contexts)]}
    base["rows"] = rows[1 % len(rows)]
    asked = {key: value for key, value in vars(arguments).items() if key != "out"}
    record: dict[str, Any] = {"about": machine(), "asked": asked, "decoding": [], "update": []}

    def write() -> None:
        (arguments.out / "scaling.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        (arguments.out / "scaling.md").write_text(table(record), encoding="utf-8")

    with RunProgress(Console(stderr=True)) as progress:
        for what, key, values in (
            ("rows", "rows", rows),
            ("context", "context", contexts),
            ("vocabulary", "vocab", vocabs),
            ("weights", "size", sizes),
        ):
            for value in values:
                asked_now = {**base, key: value}
                progress.phase("decoding: " + ", ".join(f"{name} {given}" for name, given in asked_now.items()))
                record["decoding"].append({"varied": what, **decoding(**asked_now, arguments=arguments)})
                write()
        for vocab in vocabs:
            for chunk, checkpointing in ((1 << 30, False), (512, False), (512, True)):
                progress.phase(f"update: vocabulary {vocab}" + (", checkpointing" if checkpointing else ""))
                record["update"].append(update(base["size"], vocab, chunk, checkpointing, arguments.dtype))
                write()
    draw(record, arguments.out / "scaling.png")
    print(table(record))
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(long_updates.main(sys.argv[1:]) if sys.argv[1:2] and sys.argv[1] in long_updates.COMMANDS else main())
