"""Runs side by side: what a step costs, by phase, and reward over steps and over time.

    python benchmarks/compare_runs.py --out results/step ours=runs/a plain=runs/b TRL=runs/trl
    python benchmarks/compare_runs.py --out results/learning --threshold 0.5 ours=runs/a,runs/b TRL=runs/c,runs/d

Each argument is NAME=FOLDER, or NAME=FOLDER,FOLDER for seeds, of `specgrpo run` or of `benchmarks/trl_run.py`. Ratios
are to the first one. `against_trl.py` makes such runs. Writes `runs.json`, `runs.md` and `runs.png`.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from eqx_specgrpo.records import machine, read_records

PHASES = ("time/rollout", "time/reward", "time/update", "time/draft", "time/step")
KEPT = (*PHASES, "reward", "entropy", "completions/mean_length", "spec/acceptance_length", "compile/count")
COLORS = ("#1b6ca8", "#c8553d", "#5a8f5a", "#e0a030", "#7a5195", "0.35")
WINDOW = 10  # steps whose mean reward is drawn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs side by side.")
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER[,FOLDER]")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--skip", type=int, default=2, help="first steps to leave out of medians: they compile")
    parser.add_argument("--threshold", type=float, help=f"reward (mean of {WINDOW} steps) to say when it is reached")
    return parser.parse_args()


def load(text: str) -> dict[str, Any]:
    name, equals, folders = text.partition("=")
    if not equals:
        raise SystemExit(f"{text}: write NAME=FOLDER")
    runs = [read_records(Path(folder) / "metrics.jsonl") for folder in folders.split(",")]
    curves = [{key: [_rounded(r.get(key)) for r in run] for key in KEPT if key in run[0]} for run in runs]
    return {"name": name, "runs": curves, "machines": [_machines(Path(folder)) for folder in folders.split(",")]}


def _machines(folder: Path) -> list[dict[str, Any]]:
    """What a run was computed on, commit included; older runs and copies may not say."""
    path = folder / "machine.jsonl"
    return read_records(path) if path.is_file() else []


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def smooth(values: list[float]) -> list[float]:
    """Means of the last steps, from the first full window on."""
    return [statistics.mean(values[end - WINDOW : end]) for end in range(WINDOW, len(values) + 1)]


def medians(arm: dict[str, Any], skip: int) -> dict[str, float]:
    """Of all steps of all seeds but the first ones, by phase."""
    found = {}
    for phase in PHASES:
        values = [value for run in arm["runs"] for value in run.get(phase, [])[skip:] if value is not None]
        if values:
            found[phase] = statistics.median(values)
    return found


def reached(run: dict[str, Any], threshold: float) -> tuple[int, float] | None:
    """Steps and seconds until the mean reward of a window is as high."""
    elapsed = list(itertools.accumulate(run["time/step"]))
    for index, value in enumerate(smooth(run["reward"])):
        if value >= threshold:
            return index + WINDOW, elapsed[index + WINDOW - 1]
    return None


def table(arms: list[dict[str, Any]], skip: int, threshold: float | None) -> str:
    lines = [
        "| run | seeds | step, s | rollout, s | update, s | draft, s | draft's share | rollout's share | "
        "step of the first over it | compilations |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = medians(arms[0], skip)["time/step"]
    for arm in arms:
        m = medians(arm, skip)
        step = m["time/step"]
        compiled = [run["compile/count"][-1] for run in arm["runs"] if "compile/count" in run]
        draft = m.get("time/draft", 0.0)
        lines.append(
            f"| {arm['name']} | {len(arm['runs'])} | {step:.1f} | {m['time/rollout']:.1f} | {m['time/update']:.1f} | "
            f"{draft:.2f} | {draft / step:.1%} | {m['time/rollout'] / step:.0%} | "
            f"{step / first:.2f} | {max(compiled, default='')} |"
        )
    share = medians(arms[0], skip)
    bound = 1 / (1 - share["time/rollout"] / share["time/step"])
    lines += [
        "",
        f"Were rollouts free, a step of the first would be {bound:.2f} times as fast: no decoding can give more.",
    ]
    if threshold is not None:
        lines += ["", f"| run | steps to a reward of {threshold} | seconds |", "| --- | --- | --- |"]
        for arm in arms:
            for run in arm["runs"]:
                found = reached(run, threshold)
                lines.append(
                    f"| {arm['name']} | " + ("not reached | |" if found is None else f"{found[0]} | {found[1]:.0f} |")
                )
    return "\n".join(lines) + "\n"


def draw(arms: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for arm, color in zip(arms, itertools.cycle(COLORS), strict=False):
        for number, run in enumerate(arm["runs"]):
            curve = smooth(run["reward"])
            elapsed = list(itertools.accumulate(run["time/step"]))[WINDOW - 1 :]
            label = arm["name"] if number == 0 else None
            panels[0].plot(range(WINDOW, WINDOW + len(curve)), curve, color=color, label=label)
            panels[1].plot([seconds / 60 for seconds in elapsed], curve, color=color)
    panels[0].set_xlabel("step")
    panels[1].set_xlabel("minutes")
    panels[0].set_ylabel(f"reward, mean of {WINDOW} steps")
    panels[0].legend(fontsize="small", frameon=False)
    for panel in panels:
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arms = [load(text) for text in arguments.runs]
    text = table(arms, arguments.skip, arguments.threshold)
    record = {"compared_on": machine(), "arms": arms}  # what the runs were made on, each arm says itself
    (arguments.out / "runs.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (arguments.out / "runs.md").write_text(text, encoding="utf-8")
    draw(arms, arguments.out / "runs.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
