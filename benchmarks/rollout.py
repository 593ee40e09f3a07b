"""Tokens a second of plain, speculative and adaptive decoding for several numbers of rows, the physical floor of a
round, and transformers' `generate` on the same prompts.

    python benchmarks/rollout.py --out results/rollout --model path/to/folder --draft drafts/hydra
    python benchmarks/rollout.py --out results/rollout --draft medusa --rows 16 --lengths 1,2

Every arm decodes the same prompts in every round, one after the other in one process; ratios are within a round, their
median and range. "In sum" is all tokens over all seconds. On a machine with other work, "at median costs" is steadier:
the rounds that each arm ran, all of a kind at one price. Where completions end at random, the luck of their lengths
moves all three; `--ignore-eos` takes it out. Writes `rollout.json`, `rollout.md` and `rollout.png`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from rich.console import Console

from eqx_specgrpo import Prompts
from eqx_specgrpo.bench import (
    PLAIN,
    BenchSettings,
    draft_run_config,
    generate_for,
    make_contender,
    measure_drafts,
    plot_bench,
    prepare,
    whole_numbers,
)
from eqx_specgrpo.config import default_model_path, largest_of_products, load_policy
from eqx_specgrpo.decoding import (
    AbstractLengthController,
    AbstractVerifier,
    AdaptiveLength,
    FixedLength,
    Sampling,
    SegmentObservation,
    decode,
    make_verifier,
)
from eqx_specgrpo.drafts import AbstractDraft, NoDraft
from eqx_specgrpo.grpo import compute_copy
from eqx_specgrpo.models import AbstractLanguageModel
from eqx_specgrpo.records import RunProgress, machine
from eqx_specgrpo.runtime import keep_freed_memory
from eqx_specgrpo.train import next_examples

SAMPLES = 8  # completions a prompt, where there are as many rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rollouts: tokens a second, and how far from the floor.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", default="", help="folder or .gguf file; the embedded model by default")
    parser.add_argument("--draft", action="append", help="folder of a saved draft, or a kind; repeatable")
    parser.add_argument("--rows", default="1,4,8,16,32,64")
    parser.add_argument("--lengths", default="1,2,3,4")
    parser.add_argument("--verifier", default="block")
    parser.add_argument("--max-completion-length", type=int, default=128)
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on after an end of sequence: all arms make as many tokens"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0, help="to get a draft ready that is not a saved one")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for specgrpo; repeatable")
    parser.add_argument(
        "--transformers-rows", default="16", help="rows to compare with transformers at; empty for no comparison"
    )
    return parser.parse_args()


def median_seconds(call: Callable[[], Any], times: int = 7) -> float:
    call()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def floor_seconds(target: AbstractLanguageModel, rows: int) -> dict[str, float]:
    """The least that a pass over one token of each row can take: reading the weights, and their products alone."""
    weights = [x for x in jax.tree.leaves(eqx.filter(target, eqx.is_inexact_array)) if x.ndim == 2]
    inputs = {x.shape[1]: jr.normal(jr.key(0), (rows, x.shape[1])) for x in weights}

    products = jax.jit(largest_of_products)
    large = jnp.ones(1 << 27, jnp.float32)
    read = median_seconds(lambda: jnp.sum(large))
    bandwidth = large.size * large.dtype.itemsize / read
    size = sum(x.size * x.dtype.itemsize for x in weights)
    return {
        "weight_bytes": size,
        "bytes_per_second": bandwidth,
        "read_seconds": size / bandwidth,
        "product_seconds": median_seconds(lambda: products(inputs, weights)),
    }


def transformers_generate(
    model: Any, prompts: Prompts, samples: int, new: int, eos_ids: Sequence[int], seed: int
) -> tuple[int, float]:
    """Tokens up to the end of each sequence, and seconds."""
    import torch

    torch.manual_seed(seed)
    width = int(prompts.lengths.max())
    padding = eos_ids[0] if eos_ids else 0
    ids = np.full((len(prompts.lengths), width), padding, np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(prompts.lengths):
        ids[row, width - length :] = prompts.tokens[row, :length]
        mask[row, width - length :] = 1
    ids, mask = (torch.from_numpy(np.repeat(x, samples, axis=0)) for x in (ids, mask))
    begin = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, eos_token_id=list(eos_ids) or None, pad_token_id=padding,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    tokens = output[:, width:].numpy()
    is_eos = np.isin(tokens, eos_ids)
    lengths = np.where(is_eos.any(1), is_eos.argmax(1) + 1, tokens.shape[1])
    return int(lengths.sum()), seconds


def against_transformers(
    path: str,
    target: AbstractLanguageModel,
    drafts: dict[str, AbstractDraft],
    prompts: Sequence[Prompts],
    samples: int,
    eos_ids: Sequence[int],
    arguments: argparse.Namespace,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Plain, speculative and adaptive decoding, and `generate` in float32 and bfloat16, in turn, round by round; the
    first round is the warm-up."""
    import torch
    from transformers import AutoModelForCausalLM

    file = Path(path)
    where = (file.parent, {"gguf_file": file.name}) if file.suffix == ".gguf" else (file, {})
    models = {
        f"transformers {name}": AutoModelForCausalLM.from_pretrained(
            where[0], **where[1], dtype=getattr(torch, name)
        ).eval()
        for name in ("float32", "bfloat16")
    }

    lengths = whole_numbers("--lengths", arguments.lengths)
    verifier = make_verifier(arguments.verifier)
    arms: dict[str, Callable[[Prompts, int], tuple[int, float]]] = {}
    ours = f"ours {arguments.dtype}, "
    arms[ours + PLAIN] = our_decoding(
        target, NoDraft(), None, FixedLength(0), samples, eos_ids, arguments.max_completion_length
    )
    for name, draft in drafts.items():
        for length in (*map(FixedLength, lengths), AdaptiveLength(max(lengths))):
            text = f"length {length.length}" if isinstance(length, FixedLength) else "adaptive"
            arms[f"{ours}{name}, {text}"] = our_decoding(
                target, draft, verifier, length, samples, eos_ids, arguments.max_completion_length
            )
    for name, model in models.items():
        arms[name] = lambda batch, seed, model=model: transformers_generate(
            model, batch, samples, arguments.max_completion_length, eos_ids, seed
        )
    found = []
    for number, batch in enumerate(prompts):
        for name, arm in arms.items():
            say(f"round {number} of {len(prompts) - 1}, {name}")
            tokens, seconds = arm(batch, number)
            if name.startswith("ours"):
                while number == 0 and seconds > 1.2 * (again := arm(batch, number)[1]):  # It compiled.
                    seconds = again
            if number:
                rows = len(batch.lengths) * samples
                found.append({"arm": name, "rows": rows, "round": number, "tokens": tokens, "seconds": seconds})
    return found


def our_decoding(
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    verifier: AbstractVerifier | None,
    length: AbstractLengthController,
    samples: int,
    eos_ids: Sequence[int],
    new: int,
) -> Callable[[Prompts, int], tuple[int, float]]:
    """Tokens and seconds of a decoding. What a controller learns it keeps for the next."""
    state: Any = None

    def seen(observation: SegmentObservation, length_state: Any) -> None:
        nonlocal state
        state = length_state

    def run(batch: Prompts, seed: int) -> tuple[int, float]:
        begin = time.perf_counter()
        rollouts = decode(
            target, batch, draft=draft, verifier=verifier, length=length, length_state=state, sampling=Sampling(1.0),
            key=jr.key(seed), max_new_tokens=new, eos_ids=eos_ids, samples=samples, on_segment=seen,
        )  # fmt: skip
        return int(rollouts.lengths.sum()), time.perf_counter() - begin

    return run


Kind = tuple[int, str, str | None, int | str]
"""Rows, draft, verifier and length, of an arm or of a round."""


def ratios_in_sum(runs: Sequence[dict[str, Any]]) -> dict[Kind, float]:
    """All tokens over all seconds, over plain decoding's. Where completions end at random, a single decoding's tokens a
    second say as much of its completions as of its speed."""
    sums: dict[Kind, tuple[float, float]] = {}
    for run in runs:
        arm = (run["rows"], run["draft"], run["verifier"], run["length"])
        tokens, seconds = sums.get(arm, (0.0, 0.0))
        sums[arm] = (tokens + run["tokens"], seconds + run["seconds"])
    rates = {arm: tokens / seconds for arm, (tokens, seconds) in sums.items()}
    plain = {rows: rate for (rows, draft, _, _), rate in rates.items() if draft == PLAIN}
    return {arm: rate / plain[arm[0]] for arm, rate in rates.items() if arm[0] in plain}


def ratios_at_median_costs(runs: Sequence[dict[str, Any]]) -> dict[Kind, float]:
    """Tokens a second over plain decoding's, had each kind of round taken its median time, of all decodings together.

    Which rounds an arm runs, and with how few rows at the end, is its own doing; how fast the machine was meanwhile is
    not. Prompts, and what the host does between segments, are left out.
    """
    costs: dict[Kind, list[float]] = {}
    for run in runs:
        for segment in run["segments"]:
            # Once for each round: a long segment says more.
            per_round = [segment["seconds"] / max(1, segment["rounds"])] * segment["rounds"]
            costs.setdefault(_kind(run, segment), []).extend(per_round)
    medians = {kind: statistics.median(values) for kind, values in costs.items() if values}
    sums: dict[Kind, tuple[float, float]] = {}
    for run in runs:
        arm = (run["rows"], run["draft"], run["verifier"], run["length"])
        tokens, seconds = sums.get(arm, (0.0, 0.0))
        tokens += sum(segment["tokens"] for segment in run["segments"])
        seconds += sum(segment["rounds"] * medians.get(_kind(run, segment), 0.0) for segment in run["segments"])
        sums[arm] = (tokens, seconds)
    rates = {arm: tokens / seconds for arm, (tokens, seconds) in sums.items() if seconds > 0}
    plain = {rows: rate for (rows, draft, _, _), rate in rates.items() if draft == PLAIN}
    return {arm: rate / plain[arm[0]] for arm, rate in rates.items() if arm[0] in plain}


def _kind(run: dict[str, Any], segment: dict[str, Any]) -> Kind:
    """Of a segment's rounds. Those that do not draft are alike, whatever draft and verifier there are."""
    draft, verifier = (run["draft"], run["verifier"]) if segment["length"] else (PLAIN, None)
    return segment["rows"], draft, verifier, segment["length"]


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "| rows | draft | length | tokens/s | ratio to plain | in sum | at median costs | acceptance length | "
        "round, ms | share of the floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    in_sum = ratios_in_sum(record["runs"])
    at_medians = ratios_at_median_costs(record["runs"])
    for row in record["results"]:
        floor = record["floor"][str(row["rows"])]
        full = row["by_rows"].get(str(row["rows"]))
        milliseconds, share = "", ""
        if full is not None:
            seconds = full["seconds_per_round"]["median"]
            milliseconds = f"{1e3 * seconds:.0f}"
            if row["draft"] == PLAIN:
                share = f"{max(floor['read_seconds'], floor['product_seconds']) / seconds:.0%}"
        ratio = row["ratio"]
        arm = (row["rows"], row["draft"], row["verifier"], row["length"])
        lines.append(
            f"| {row['rows']} | {row['draft']} | {row['length']} | {row['tokens_per_second']['median']:.0f} | "
            f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) | "
            f"{in_sum[arm]:.2f} | {at_medians[arm]:.2f} | {row['acceptance_length']:.2f} | "
            f"{milliseconds} | {share} |"
        )
    if record["settings"]["ignore_eos"]:
        lines += ["", "Ends of sequence were ignored."]
    stolen = sum(run["stolen_seconds"] or 0.0 for run in record["runs"])
    if stolen >= 1:
        seconds = sum(run["seconds"] for run in record["runs"])
        lines += [
            "",
            f"In these {seconds:.0f} s the host gave {stolen:.0f} s of the processors' time to other machines.",
        ]
    if record["transformers"]:
        lines += [
            "",
            "| rows | arm | tokens/s | over `generate`, float32 | bfloat16 |",
            "| --- | --- | --- | --- | --- |",
        ]
        for rows in dict.fromkeys(run["rows"] for run in record["transformers"]):
            runs = [run for run in record["transformers"] if run["rows"] == rows]
            rates = {
                arm: [run["tokens"] / run["seconds"] for run in runs if run["arm"] == arm]
                for arm in dict.fromkeys(run["arm"] for run in runs)
            }
            theirs = [rates["transformers float32"], rates["transformers bfloat16"]]
            for arm, values in rates.items():
                over = [statistics.median(a / b for a, b in zip(values, other, strict=True)) for other in theirs]
                lines.append(f"| {rows} | {arm} | {statistics.median(values):.0f} | {over[0]:.2f} | {over[1]:.2f} |")
    return "\n".join(lines) + "\n"


def settings_of(rows: int, arguments: argparse.Namespace) -> BenchSettings:
    return BenchSettings(
        rows=(rows,),
        lengths=whole_numbers("--lengths", arguments.lengths),
        adaptive=True,
        verifiers=(arguments.verifier,),
        max_completion_length=arguments.max_completion_length,
        ignore_eos=arguments.ignore_eos,
        samples=min(rows, SAMPLES),
        rounds=arguments.rounds,
    )


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    drafts = arguments.draft or ["ngram"]
    record: dict[str, Any] = {"about": machine(), "results": [], "runs": [], "floor": {}, "transformers": []}
    flags = {"model.path": arguments.model or None, "seed": arguments.seed, "model.dtype": arguments.dtype}
    with RunProgress(Console(stderr=True)) as progress:
        policy, tokenizer = load_policy(arguments.model)
        target = compute_copy(policy, arguments.dtype)
        every_rows = whole_numbers("--rows", arguments.rows)
        settings = [settings_of(rows, arguments) for rows in every_rows]
        configs = {name: draft_run_config(name, settings[0], None, arguments.set, flags) for name in drafts}
        made = [make_contender(Path(name).name, config, policy, tokenizer) for name, config in configs.items()]
        generations = generate_for(made, target, arguments.minutes, progress)
        ready = [prepare(one, target, arguments.minutes, progress, generations) for one in made]
        for rows, asked in zip(every_rows, settings, strict=True):
            found = measure_drafts(ready, target, asked, progress, record["about"]).to_json()
            record["results"] += found["results"]
            record["runs"] += found["runs"]
            record |= {key: found[key] for key in ("settings", "policy")}
            record["drafts"] = [{"name": draft["name"], "class": draft["class"]} for draft in found["drafts"]]
            record["model"] = {**found["model"], "name": Path(arguments.model or "embedded").name}
            record["floor"][str(rows)] = floor_seconds(target, rows)
            write(record, arguments.out)
        for text in filter(None, arguments.transformers_rows.split(",")):
            rows, samples = int(text), min(int(text), SAMPLES)
            count, task = rows // samples, made[0].parts.task
            _, prompts = next_examples(
                task, tokenizer, target, 1 << 21, count * (1 + arguments.rounds), arguments.max_completion_length
            )
            record["transformers"] += against_transformers(
                arguments.model or str(default_model_path()), target, {one.name: one.draft for one in ready},
                prompts.parts(count), samples, () if arguments.ignore_eos else tokenizer.eos_ids, arguments,
                progress.phase,
            )  # fmt: skip
            write(record, arguments.out)
    print((arguments.out / "rollout.md").read_text(encoding="utf-8"))
    return 0


def write(record: dict[str, Any], out: Path) -> None:
    (out / "rollout.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (out / "rollout.md").write_text(table(record), encoding="utf-8")
    entropy = record["policy"]["entropy"]
    plot_bench(record["results"], out / "rollout.png", f"{record['model']['name']}, {entropy:.2f} nats a token")


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
