"""What learning online is worth: one GRPO run with plain decoding, with a frozen draft, and with drafts that learn on.

    python benchmarks/online.py --out results/online
    python benchmarks/online.py --out results/online --steps 40 --seeds 0 --set draft.kind=hydra

Each arm is a whole run of `specgrpo run`, one for each seed; arms with a draft warm it up alike. Runs are kept in
`OUT/runs`; one that was stopped goes on from its last checkpoint, one that is done is not repeated. `online.json`,
`online.md` and `online.png` are written anew after every run.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from eqx_specgrpo.bench import whole_numbers
from eqx_specgrpo.config import load_config
from eqx_specgrpo.records import machine, read_records
from eqx_specgrpo.runtime import keep_freed_memory
from eqx_specgrpo.train import run

ARMS = {
    "plain": {"draft.mode": "off"},
    "frozen": {"draft.mode": "frozen"},
    "online, KL": {"draft.mode": "online", "draft.loss": "kl"},
    "online, LK hybrid": {"draft.mode": "online", "draft.loss": "hybrid"},
}
COLORS = ("0.35", "#c8553d", "#1b6ca8", "#5a8f5a")
KEPT = ("reward", "entropy", "spec/acceptance_length", "completions/mean_length", "time/rollout", "time/draft")
WINDOW = 5  # steps whose mean is drawn and tabled


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plain decoding, a frozen draft, and drafts that learn online.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--config", type=Path, help="TOML file of the run; the embedded default run otherwise")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--warmup", type=int, default=60, help="updates of the fresh draft before the first step")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for specgrpo; repeatable")
    parser.add_argument("--draw", action="store_true", help="only draw what is there")
    return parser.parse_args()


def one_run(arm: str, seed: int, arguments: argparse.Namespace) -> None:
    """Does what is missing of a run."""
    folder = arguments.out / "runs" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    warmup = {} if arm == "plain" else {"draft.warmup": arguments.warmup}
    flags = {"seed": seed, "steps": arguments.steps, "out": str(folder), **warmup, **ARMS[arm]}
    config = load_config(arguments.config, arguments.set, flags)
    if (folder / "policy" / "model.safetensors").exists():
        return
    run(config, resume=folder.exists(), console=Console(stderr=True))


def collect(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is there of each arm and seed, step by step."""
    found = []
    for arm in ARMS:
        for seed in whole_numbers("--seeds", arguments.seeds):
            folder = arguments.out / "runs" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            if (folder / "policy" / "model.safetensors").exists():
                records = read_records(folder / "metrics.jsonl")
                curves = {key: [_rounded(record.get(key)) for record in records] for key in KEPT}
                found.append({"arm": arm, "seed": seed, "curves": curves})
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def smooth(values: Sequence[float]) -> list[float]:
    """Means of windows that end at each step."""
    return [statistics.mean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]


def table(runs: list[dict[str, Any]]) -> str:
    """Means over the seeds of the first and last steps, with the least and the greatest."""
    lines = [
        f"| arm | seeds | acceptance length, first {WINDOW} steps | last {WINDOW} | reward, first {WINDOW} | "
        f"last {WINDOW} | entropy, last {WINDOW} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        curves = [one["curves"] for one in runs if one["arm"] == arm]
        if curves:
            cells = [
                _spread([statistics.mean(part(curve[key])) for curve in curves])
                for key, part in (
                    ("spec/acceptance_length", lambda c: c[:WINDOW]),
                    ("spec/acceptance_length", lambda c: c[-WINDOW:]),
                    ("reward", lambda c: c[:WINDOW]),
                    ("reward", lambda c: c[-WINDOW:]),
                    ("entropy", lambda c: c[-WINDOW:]),
                )
            ]
            lines.append(f"| {arm} | {len(curves)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"


def draw(runs: list[dict[str, Any]], path: Path, title: str) -> None:
    """Acceptance length and reward over the steps: the mean of the seeds, and a band from the least to the greatest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(1, 2)
    for panel, key, label in zip(
        panels, ("spec/acceptance_length", "reward"), ("acceptance length, tokens a target pass", "reward"), strict=True
    ):
        for arm, color in zip(ARMS, COLORS, strict=True):
            curves = [smooth(one["curves"][key]) for one in runs if one["arm"] == arm]
            if not curves or (arm == "plain" and key != "reward"):
                continue
            by_step = list(zip(*curves, strict=False))
            steps = range(1, len(by_step) + 1)
            panel.fill_between(
                steps, [min(x) for x in by_step], [max(x) for x in by_step], color=color, alpha=0.15, linewidth=0
            )
            panel.plot(steps, [statistics.mean(x) for x in by_step], color=color, label=arm)
        panel.set_xlabel("step")
        panel.set_ylabel(label)
        panel.grid(alpha=0.25)
    panels[1].legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> int:
    arguments = parse_arguments()
    seeds = whole_numbers("--seeds", arguments.seeds)
    for seed in seeds if not arguments.draw else ():
        for arm in ARMS:
            one_run(arm, seed, arguments)
            write(arguments)
    write(arguments)
    return 0


def write(arguments: argparse.Namespace) -> None:
    runs = collect(arguments)
    if not runs:
        return
    asked = {"steps": arguments.steps, "warmup": arguments.warmup, "set": arguments.set}
    record = {"about": machine(), "asked": asked, "runs": runs}
    (arguments.out / "online.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (arguments.out / "online.md").write_text(table(runs), encoding="utf-8")
    seeds = len({one["seed"] for one in runs})
    title = f"Means of {WINDOW} steps and of {seeds} seed{'s' if seeds > 1 else ''}; bands: the least and the greatest"
    draw(runs, arguments.out / "online.png", title)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
