"""Whole runs on completions whose lengths spread over more than a decade: plain, and speculative as a run does by
default.

    python benchmarks/long_runs.py --out results/long_runs --model path/to/SmolLM2-135M-Instruct
    python benchmarks/long_runs.py --out results/short --model path/to/model --prompts 2 --learned 15 --seeds 0

The task is lists of sums to be written again with their results (`many_sums.py`), 2 to 70 of them, spread
geometrically: right answers take 20 to 900 tokens, 235 on average. `--task reasoning_gym:NAME` takes another one. With
`--learned N` the policy first learns for N steps, with plain decoding, on lists that are shorter (`--learn-sums`).

Each arm is a process of its own. They take turns step by step, first one first and then the other, so that both meet
the machine in the same states; the one that waits computes nothing. Each begins with an empty cache of compiled
programs. `OUT/runs` has the run folders. What was made to its end is not made again. `long_runs.json` and
`long_runs.md` are written after each pair.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np
from many_sums import write_task
from rich.console import Console
from scipy.optimize import nnls

from eqx_specgrpo.bench import whole_numbers
from eqx_specgrpo.config import load_config
from eqx_specgrpo.decoding import FixedLength, SegmentObservation, decode, plain_seconds
from eqx_specgrpo.grpo import compute_copy
from eqx_specgrpo.records import machine, read_records
from eqx_specgrpo.runtime import keep_freed_memory
from eqx_specgrpo.train import AbstractCallback, RunView, run

HERE = Path(__file__).parent
ARMS = ("plain", "speculative")
GO, DONE = "go", "done"
OF_SIZE = "spec/seconds_rows_"  # seconds of rounds by the size of the batch, in a step's record
POSITIONS = (0, 64, 128, 256, 512)  # where the bins of acceptance by position in the trace begin


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whole runs of long and uneven completions, with speculation and not.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", default="", help="folder or .gguf file; by default the embedded model")
    parser.add_argument("--task", default="sums", help="sums, or a task as for specgrpo run")
    parser.add_argument("--sums", default="2-70", help="how many there are in a list")
    parser.add_argument("--learned", default="0,15", help="steps that the policy has learned for, one or several")
    parser.add_argument("--learn-sums", default="2-24", help="how many there are in the lists that it learns on")
    parser.add_argument("--learn-tokens", type=int, default=384, help="the most tokens of those completions")
    parser.add_argument("--prompts", default="2,1", help="of a step, one or several; each has eight completions")
    parser.add_argument("--tokens", type=int, default=1024, help="the most tokens of a completion")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for both arms; repeatable")
    parser.add_argument("--draft-set", action="append", default=[], metavar="KEY=VALUE", help="for the speculative arm")
    parser.add_argument("--one-run", help=argparse.SUPPRESS)  # what a child process is told
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------- one run, a child


class Turns(AbstractCallback):
    """Waits for its turn before the run begins and after each step; at the end says how acceptance goes by position."""

    def __init__(self, positions_path: Path | None, tokens: int):
        self._positions_path, self._tokens = positions_path, tokens

    def begin(self, run: RunView) -> None:
        _wait()

    def step(self, run: RunView, metrics: Mapping[str, float | int]) -> None:
        print(DONE, flush=True)
        if run.done < run.config.steps:
            _wait()

    def end(self, run: RunView) -> None:
        if self._positions_path is not None and run.draft.max_length > 0:
            self._positions_path.write_text(json.dumps(acceptance_by_position(run, self._tokens)), encoding="utf-8")


def _wait() -> None:
    if sys.stdin.readline().strip() != GO:
        raise SystemExit("the benchmark has ended")


def acceptance_by_position(run: RunView, tokens: int) -> list[dict[str, float]]:
    """Tokens a round of a row, by where in their completions rows stood, with the final policy and draft."""
    problems = [json.loads(line) for line in Path(run.config.task.name).read_text(encoding="utf-8").splitlines()[-2:]]
    prompts = [run.tokenizer.encode_prompt(problem["prompt"]) for problem in problems]
    seen: list[SegmentObservation] = []
    decode(
        compute_copy(run.policy, run.config.model.dtype),
        prompts,
        draft=compute_copy(run.draft, run.config.model.dtype),
        length=FixedLength(min(3, run.draft.max_length)),
        key=jr.key(run.config.seed),
        max_new_tokens=tokens,
        eos_ids=run.tokenizer.eos_ids,
        samples=run.config.grpo.num_generations,
        on_segment=lambda observation, _: seen.append(observation),
    )
    bins = {start: [0.0, 0.0] for start in POSITIONS}
    position = 1.0  # of an active row: all start together, and those that are left have gone on alike
    for segment in seen:
        if segment.active_rounds > 0:
            gone = segment.rounds * segment.tokens / segment.active_rounds
            start = max(start for start in POSITIONS if start <= position + gone / 2)
            bins[start][0] += segment.tokens
            bins[start][1] += segment.active_rounds
            position += gone
    return [
        {"from": start, "tokens_a_round": emitted / rounds, "rounds": rounds}
        for start, (emitted, rounds) in bins.items()
        if rounds > 0
    ]


def one_run(text: str) -> int:
    asked = json.loads(text)
    keep_freed_memory()
    path = None if asked["positions"] is None else Path(asked["positions"])
    config = load_config(None, asked["set"], asked["flags"])
    run(config, callbacks=Turns(path, config.grpo.max_completion_length), console=Console(file=sys.stderr))
    return 0


# ---------------------------------------------------------------------------------------------- the pair of them


class Arm:
    """A run in a process of its own, which waits for its turns."""

    def __init__(self, folder: Path, flags: dict[str, Any], overrides: Sequence[str], positions: Path | None):
        asked = {"flags": flags, "set": list(overrides), "positions": None if positions is None else str(positions)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._log = folder.with_suffix(".log").open("w", encoding="utf-8")
        self._programs = folder.with_suffix(".programs")
        shutil.rmtree(self._programs, ignore_errors=True)
        command = [sys.executable, str(HERE / "long_runs.py"), "--out", str(folder), "--one-run", json.dumps(asked)]
        # As under the command line, from a cache of programs that is empty.
        kept = {"JAX_COMPILATION_CACHE_DIR": str(self._programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | kept,
        )

    def turn(self) -> None:
        """Lets it make a step."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(GO + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.strip() == DONE:
                return
        raise SystemExit(f"a run has ended with {self._process.wait()}: see {self._log.name}")

    def end(self) -> None:
        assert self._process.stdin is not None
        if self._process.wait() != 0:
            raise SystemExit(f"a run has ended with {self._process.returncode}: see {self._log.name}")
        self._log.close()
        shutil.rmtree(self._programs, ignore_errors=True)


def flags_of(arguments: argparse.Namespace, arm: str, model: str, prompts: int, seed: int, folder: Path):
    task = arguments.task if arguments.task != "sums" else str(arguments.out / "sums.jsonl")
    flags = {
        "model.path": model,
        "model.dtype": arguments.dtype,
        "task.name": task,
        "seed": seed,
        "steps": arguments.steps,
        "save_steps": arguments.steps,
        "compare": False,
        "out": str(folder),
        "grpo.prompts_per_step": prompts,
        "grpo.num_generations": 8,
        "grpo.max_completion_length": arguments.tokens,
        "grpo.learning_rate": 2e-5,
        "grpo.lr_scheduler_type": "constant",
    }
    if arguments.task == "sums":
        flags["reward.functions"] = [f"{HERE / 'many_sums.py'}:sums_right"]
    return flags | ({"draft.mode": "off"} if arm == "plain" else {})


def learned_policy(arguments: argparse.Namespace, steps: int) -> str:
    """The folder of a policy that has learned for so many steps."""
    folder = arguments.out / f"learned-{steps}"
    if steps > 0 and not (folder / "policy" / "model.safetensors").exists():
        task = arguments.out / "learn.jsonl"
        write_task(task, 400, arguments.learn_sums, 12)
        flags = flags_of(arguments, "plain", arguments.model, 2, 0, folder)
        flags |= {"steps": steps, "save_steps": 5, "grpo.max_completion_length": arguments.learn_tokens}
        if arguments.task == "sums":
            flags["task.name"] = str(task)
        run(load_config(None, arguments.set, flags), resume=folder.exists(), console=Console(stderr=True))
    return arguments.model if steps == 0 else str(folder / "policy")


def pair(arguments: argparse.Namespace, learned: int, prompts: int, seed: int) -> dict[str, Any]:
    """Both arms, step by step in turns."""
    model = learned_policy(arguments, learned)
    name = f"{arguments.task.replace(':', '-')}-{learned}-{prompts}x8-{seed}"
    folders = {arm: arguments.out / "runs" / f"{name}-{arm}" for arm in ARMS}
    positions = arguments.out / "runs" / f"{name}-positions.json"
    if not all((folder / "policy" / "model.safetensors").exists() for folder in folders.values()):
        if any(folder.exists() for folder in folders.values()):
            raise SystemExit(f"{name} was stopped on its way: remove {arguments.out / 'runs' / name}*")
        arms = {}
        for arm, folder in folders.items():
            overrides = [*arguments.set, *(arguments.draft_set if arm == "speculative" else ())]
            where = positions if arm == "speculative" and arguments.task == "sums" else None
            arms[arm] = Arm(folder, flags_of(arguments, arm, model, prompts, seed, folder), overrides, where)
        for step in range(arguments.steps):
            for arm in ARMS if (step + seed) % 2 == 0 else ARMS[::-1]:
                begin = time.perf_counter()
                arms[arm].turn()
                print(f"{name} step {step + 1} {arm}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
        for arm in arms.values():
            arm.end()
    found = {arm: account(folder) for arm, folder in folders.items()}
    where = json.loads(positions.read_text(encoding="utf-8")) if positions.exists() else []
    return {"task": arguments.task, "learned": learned, "prompts": prompts, "seed": seed, "arms": found, "at": where}


# ------------------------------------------------------------------------------------------------------- the accounts


def account(folder: Path) -> dict[str, Any]:
    """What a run took, compiling apart, and its steps."""
    steps, starts = read_records(folder / "metrics.jsonl"), read_records(folder / "times.jsonl")

    def phase(which: str, name: str) -> float:
        return sum(start[which].get(name, 0.0) for start in starts)

    names = ("warm-up", "rollout", "reward", "update", "draft")
    compiling = {name: phase("compiling", name) for name in names}
    seconds = {name: phase("seconds", name) - compiling[name] for name in names}
    kept = ("time/rollout", "time/draft", "time/update", "time/step", "completions/mean_length", "reward", "entropy")
    families = ("spec/seconds", "draft/seconds", "draft/lessons", "spec/acceptance_length", "completions/max_length")
    families += ("spec/rounds", "spec/kinds")
    lines = [{k: v for k, v in step.items() if k in kept or k.startswith(families)} for step in steps]
    for line in lines:
        line["lengths"] = []
    places = {step["step"]: place for place, step in enumerate(steps)}
    for completion in read_records(folder / "completions.jsonl"):
        lines[places[completion["step"]]]["lengths"].append(completion["length"])
    return {"seconds": seconds, "compiling": compiling, "steps": lines}


def seconds_by_size(step: Mapping[str, Any]) -> dict[int, float]:
    """Seconds of a step's rounds, by the size of the batch."""
    return {int(name.removeprefix(OF_SIZE)): value for name, value in step.items() if name.startswith(OF_SIZE)}


def smallest_batch(arm: Mapping[str, Any]) -> int:
    """That an arm has had. Rows that are fewer are decoded in it as well."""
    return min((size for step in arm["steps"] for size in seconds_by_size(step)), default=1)


def plain_rounds(arm: Mapping[str, Any]) -> Callable[[int, float], float]:
    """What a round of plain decoding takes in this arm, by rows and context: a constant and a slope for each size of
    the batch, by least squares over its steps. How many rounds of which size a step had follows from its lengths."""
    smallest = smallest_batch(arm)

    def rounds_with(lengths: Sequence[int], size: int) -> tuple[float, float]:
        array = np.asarray(lengths)
        rounds = plain_seconds(array, smallest, lambda rows, _: float(rows == size))
        return rounds, plain_seconds(array, smallest, lambda rows, context: context * (rows == size))

    fits = {}
    for size in (2**power for power in range(10)):
        seen = [(*rounds_with(step["lengths"], size), seconds_by_size(step).get(size, 0.0)) for step in arm["steps"]]
        rounds = np.array([one for one in seen if one[0] > 0 and one[2] > 0]).reshape(-1, 3)
        if len(rounds) > 0:
            weights = 1 / np.sqrt(rounds[:, :1])
            fits[size] = nnls(rounds[:, :2] * weights, rounds[:, 2] * weights[:, 0])[0]

    def cost(rows: int, context: float) -> float:
        constant, slope = fits[min(fits, key=lambda size: abs(math.log(size / rows)))]
        return float(constant + slope * context)

    return cost


def same_completions(plain: Mapping[str, Any], speculative: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of rounds for the completions of the speculative arm: plain ones at the plain arm's costs, and its own,
    compiling left out. The arms learn from other samples and become other policies: this compares nothing else."""
    cost, steps, smallest = plain_rounds(plain), speculative["steps"], smallest_batch(plain)
    own = sum(sum(seconds_by_size(step).values()) for step in steps)
    return sum(plain_seconds(np.asarray(step["lengths"]), smallest, cost) for step in steps), own


def tokens(arm: Mapping[str, Any], prompts: int) -> float:
    return sum(step["completions/mean_length"] * prompts * 8 for step in arm["steps"])


def table(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Seconds in sum, and how many times as fast as plain the speculative arm was."""
    columns = (
        "policy", "rows", "seed", "rollouts: plain, s", "speculative, s", "ratio", "ratio a token",
        "rounds of the same completions", "lessons, s",
        "warm-up, s", "steps: plain, s", "speculative, s", "ratio", "compiling: plain, s", "speculative, s",
        "saved by its own account, s", "by the plain arm's rounds, s",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for one in pairs:
        plain, spec = one["arms"]["plain"], one["arms"]["speculative"]
        rollouts = [arm["seconds"]["rollout"] for arm in (plain, spec)]
        steps = [sum(arm["seconds"][p] for p in ("rollout", "reward", "update", "draft")) for arm in (plain, spec)]
        each = [seconds / tokens(arm, one["prompts"]) for seconds, arm in zip(rollouts, (plain, spec), strict=True)]
        compiling = [sum(arm["compiling"].values()) for arm in (plain, spec)]
        same = same_completions(plain, spec)
        saved = sum(step.get("draft/seconds_saved", step.get("spec/seconds_saved", 0.0)) for step in spec["steps"])
        cells = (
            f"{one['learned']} steps", f"{one['prompts']} x 8", f"{one['seed']}",
            f"{rollouts[0]:.0f}", f"{rollouts[1]:.0f}", f"{rollouts[0] / rollouts[1]:.2f}",
            f"{each[0] / each[1]:.2f}", f"{same[0] / same[1]:.2f}",
            f"{spec['seconds']['draft']:.0f}", f"{spec['seconds']['warm-up']:.0f}",
            f"{steps[0]:.0f}", f"{steps[1]:.0f}", f"{steps[0] / steps[1]:.2f}",
            f"{compiling[0]:.0f}", f"{compiling[1]:.0f}", f"{saved:.0f}",
            f"{same[0] - same[1]:.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *rows_table(pairs), "", *position_table(pairs)]) + "\n"


def rows_table(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Seconds of the rollouts by the size of the batch, which follows the number of active rows."""
    lines = ["| policy | rows | arm | seconds by size of the batch |", "| --- | --- | --- | --- |"]
    for one in pairs:
        for arm, found in one["arms"].items():
            sizes: dict[int, float] = {}
            for step in found["steps"]:
                for size, seconds in seconds_by_size(step).items():
                    sizes[size] = sizes.get(size, 0.0) + seconds
            text = ", ".join(f"{size}: {seconds:.0f}" for size, seconds in sorted(sizes.items(), reverse=True))
            lines.append(f"| {one['learned']} steps | {one['prompts']} x 8, seed {one['seed']} | {arm} | {text} |")
    return lines


def position_table(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tokens a round of a row by where it stood, three guesses, final policy and draft."""
    lines = ["| policy | rows | tokens a round, by position in the completion |", "| --- | --- | --- |"]
    for one in pairs:
        text = ", ".join(f"from {bin['from']}: {bin['tokens_a_round']:.2f}" for bin in one["at"])
        lines.append(f"| {one['learned']} steps | {one['prompts']} x 8, seed {one['seed']} | {text} |")
    return lines


def main() -> int:
    arguments = parse_arguments()
    if arguments.one_run is not None:
        return one_run(arguments.one_run)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.out = arguments.out.resolve()
    if arguments.task == "sums":
        write_task(arguments.out / "sums.jsonl", 400, arguments.sums, 12)
    pairs = []
    for learned in whole_numbers("--learned", arguments.learned)[::-1]:
        for prompts in whole_numbers("--prompts", arguments.prompts):
            for seed in whole_numbers("--seeds", arguments.seeds):
                pairs.append(pair(arguments, learned, prompts, seed))
                asked = {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "model")}
                record = {"about": machine(), "asked": asked, "pairs": pairs}
                (arguments.out / "long_runs.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
                (arguments.out / "long_runs.md").write_text(table(pairs), encoding="utf-8")
    ratios = [p["arms"]["plain"]["seconds"]["rollout"] / p["arms"]["speculative"]["seconds"]["rollout"] for p in pairs]
    print(table(pairs) + f"\nRollouts, median of {len(ratios)} pairs: {statistics.median(ratios):.2f} times as fast")
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
