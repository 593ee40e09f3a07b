"""How well each kind of draft guesses for several policies: distilled on the policy's own generations, then measured.

    python benchmarks/drafts.py --out results/drafts --policy embedded --policy raw=FOLDER --policy tuned=FOLDER

For each policy and seed the policy's own completions are made once; every kind learns from them, for `--minutes` in
all, and is measured against plain decoding as `specgrpo bench` does it. Each finished (policy, seed, kind) is a line of
`OUT/results.jsonl` at once: a run that was stopped goes on where it was, with the same completions. Drafts are kept in
`OUT/drafts`; pictures and a table in Markdown are drawn anew after every line.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
from rich.console import Console

from eqx_specgrpo.bench import (
    PLAIN,
    BenchSettings,
    Contender,
    draft_run_config,
    generate_for,
    make_contender,
    measure_drafts,
    plot_bench,
    prepare,
    whole_numbers,
)
from eqx_specgrpo.config import load_policy
from eqx_specgrpo.drafts import FallbackDraft, load_draft, save_draft
from eqx_specgrpo.grpo import compute_copy
from eqx_specgrpo.records import RunProgress, machine
from eqx_specgrpo.runtime import keep_freed_memory

KINDS = ("medusa", "hydra", "eagle", "layer_skip", "ngram", "ngram+hydra")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distils and measures each kind of draft.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--policy", action="append", help="NAME=FOLDER (or .gguf file), or embedded; repeatable; embedded by default"
    )
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=10.0, help="to get a draft ready, generating included")
    parser.add_argument("--rows", default="16")
    parser.add_argument("--lengths", default="1,2,3,4")
    parser.add_argument("--verifiers", default="rejection,block,coupled")
    parser.add_argument("--max-completion-length", type=int, default=128)
    parser.add_argument("--samples", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adaptive", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[KIND:]KEY=VALUE",
        help="as for specgrpo, for all kinds or for one; repeatable",
    )
    parser.add_argument("--stop-after", type=float, metavar="MINUTES", help="begin no further draft after so long")
    parser.add_argument("--draw", action="store_true", help="only draw what is there")
    return parser.parse_args()


class Results:
    """The lines of a file: one for each policy, seed and kind."""

    def __init__(self, folder: Path, asked: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.asked, self.path = folder, asked, folder / "results.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self.records = [record for line in text.splitlines() if (record := _parsed(line)) is not None]
        if text and not text.endswith("\n"):  # It was stopped in the middle of a line.
            self._append("")
        for record in self.records:
            differ = [key for key, value in asked.items() if record["asked"].get(key) != value]
            if differ:
                raise SystemExit(
                    f"{self.path} holds results with other settings ({', '.join(differ)}): use those again, or give "
                    "another --out"
                )

    def find(self, policy: str, seed: int, kind: str | None = None) -> list[dict[str, Any]]:
        return [
            record
            for record in self.records
            if (record["policy"], record["seed"]) == (policy, seed) and kind in (None, record["kind"])
        ]

    def add(self, policy: str, seed: int, kind: str, bench: dict[str, Any]) -> None:
        record = {"policy": policy, "seed": seed, "kind": kind, "asked": self.asked, **bench}
        self._append(json.dumps(record))
        self.records.append(record)

    def batches(self, policy: str, seed: int) -> int | None:
        """How many batches the drafts that are done have learned from."""
        for record in self.find(policy, seed):
            for draft in record["drafts"]:
                if "batches" in draft["prepared"]:
                    return draft["prepared"]["batches"]
        return None

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def draw(self) -> None:
        """A picture for each policy and verifier, and all in one table."""
        for policy in dict.fromkeys(record["policy"] for record in self.records):
            records = [record for record in self.records if record["policy"] == policy]
            seeds = len({record["seed"] for record in records})
            title = f"{policy}, {entropy_of(records):.2f} nats a token, {seeds} seed{'s' if seeds > 1 else ''}"
            rows = [row for record in records for row in record["results"]]
            for verifier in dict.fromkeys(row["verifier"] for row in rows if row["draft"] != PLAIN):
                chosen = [row for row in rows if row["verifier"] == verifier]
                plot_bench(chosen, self.folder / f"{policy}-{verifier}.png", f"{title}, {verifier}")
        (self.folder / "results.md").write_text(markdown(self.records), encoding="utf-8")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def entropy_of(records: list[dict[str, Any]]) -> float:
    return statistics.mean(record["policy_entropy"]["entropy"] for record in records)


def markdown(records: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the least and the greatest."""
    lines = [
        "| policy | nats a token | draft | verifier | rows | length | seeds | acceptance length | ratio to plain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    arms: dict[tuple, list[tuple[dict, dict]]] = {}
    for record in records:
        for row in record["results"]:
            if row["draft"] != PLAIN:
                arm = (record["policy"], row["draft"], row["verifier"], row["rows"], row["length"])
                arms.setdefault(arm, []).append((record, row))
    for (policy, draft, verifier, rows, length), found in arms.items():
        lengths = [row["acceptance_length"] for _, row in found]
        ratios = [row["ratio"]["median"] for _, row in found]
        entropy = entropy_of([record for record, _ in found])
        lines.append(
            f"| {policy} | {entropy:.2f} | {draft} | {verifier} | {rows} | {length} | {len(found)} | "
            f"{_mean(lengths)} | {_mean(ratios)} |"
        )
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def overrides(kind: str, every: list[str]) -> list[str]:
    """What of `--set` is for a kind."""
    chosen = []
    for text in every:
        name, equals, value = text.partition("=")
        whose, _, key = name.rpartition(":")
        if whose in ("", kind):
            chosen.append(key + equals + value)
    return chosen


def one_seed(
    name: str,
    path: str,
    seed: int,
    kinds: list[str],
    settings: BenchSettings,
    arguments: argparse.Namespace,
    results: Results,
    progress: RunProgress,
    is_late: Callable[[], bool],
) -> list[str]:
    """All kinds that are missing; what failed."""
    flags = {"model.path": path or None, "seed": seed, "model.dtype": arguments.dtype}
    configs = {kind: draft_run_config(kind, settings, None, overrides(kind, arguments.set), flags) for kind in kinds}
    progress.phase(f"{name}, seed {seed}: loading")
    policy, tokenizer = load_policy(path)
    target = compute_copy(policy, arguments.dtype)
    generations, failed = None, []
    for kind in kinds:
        if is_late():
            break
        about = machine()
        try:
            made = make_contender(kind, configs[kind], policy, tokenizer)
            learned = results.folder / "drafts" / f"{name}-hydra-{seed}"
            if isinstance(made.draft, FallbackDraft) and (learned / "draft.json").exists():
                # The same heads as alone: what the lookup adds is then all the difference.
                draft = eqx.tree_at(lambda d: d.then, made.draft, load_draft(learned, policy))
                ready = Contender(kind, made.parts, draft, {"distilled": True, "same_as": "hydra"})
            else:
                if generations is None and made.draft.train_length > 0:
                    every = [make_contender(k, configs[k], policy, tokenizer) for k in kinds]
                    batches = results.batches(name, seed)
                    generations = generate_for(every, target, settings.minutes, progress, batches)
                ready = prepare(made, target, settings.minutes, progress, generations)
                if ready.record["distilled"]:
                    save_draft(results.folder / "drafts" / f"{name}-{kind}-{seed}", ready.draft, policy, name)
            found = measure_drafts([ready], target, settings, progress, about)
            found = dataclasses.replace(found, model={**found.model, "name": name}).to_json()
            results.add(name, seed, kind, {"policy_entropy": found.pop("policy"), **found})
            results.draw()
            progress.say(f"{name}, seed {seed}, {kind}: done")
        except Exception:
            traceback.print_exc()
            progress.say(f"{name}, seed {seed}, {kind}: failed, going on with the next")
            failed.append(f"{name}, seed {seed}, {kind}")
    return failed


def main() -> int:
    arguments = parse_arguments()
    settings = BenchSettings(
        rows=whole_numbers("--rows", arguments.rows),
        lengths=whole_numbers("--lengths", arguments.lengths),
        adaptive=arguments.adaptive,
        verifiers=tuple(arguments.verifiers.split(",")),
        max_completion_length=arguments.max_completion_length,
        samples=arguments.samples,
        rounds=arguments.rounds,
        minutes=arguments.minutes,
    )
    asked = {**settings.to_json(), "dtype": arguments.dtype, "set": arguments.set}
    results = Results(arguments.out, json.loads(json.dumps(asked)))
    if arguments.draw:
        results.draw()
        return 0
    policies = {name: path for name, _, path in (text.partition("=") for text in arguments.policy or ["embedded"])}
    for name, path in policies.items():
        if not path and name != "embedded":
            raise SystemExit(f"--policy {name} says not where it is: write {name}=FOLDER")
    begin = time.monotonic()

    def is_late() -> bool:
        return arguments.stop_after is not None and time.monotonic() - begin > 60 * arguments.stop_after

    failed = []
    with RunProgress(Console(stderr=True)) as progress:
        for name, path in policies.items():
            for seed in whole_numbers("--seeds", arguments.seeds):
                missing = [kind for kind in arguments.kinds.split(",") if not results.find(name, seed, kind)]
                if missing and not is_late():
                    failed += one_seed(name, path, seed, missing, settings, arguments, results, progress, is_late)
    if failed:
        print("failed: " + "; ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
