"""Whole runs, one after the other: ours with speculation and without, and TRL's; then `compare_runs.py` on them.

    python benchmarks/against_trl.py benchmarks/learn.toml --out results/learning --model path/to/folder \
        --draft drafts/hydra --steps 46 --seeds 0,1,2 --threshold 0.5
    python benchmarks/against_trl.py benchmarks/sums.toml --out results/step --model runs/tuned/policy \
        --draft drafts/hydra --steps 6 --arms speculative,trl-bfloat16,trl-float32

The first is the benchmark `learning`, the second `step`: a step by phase, the share of the rollouts in it, and the most
that faster ones could give. Each run is a process of its own and leaves its folder under `OUT/runs`, with what it was
asked for beside it. One that is there to its end is not made again, so that a benchmark that was stopped goes on; one
that was asked for something else is refused, and never deleted. `OUT/runs.json`, `.md` and `.png` compare them. TRL has
to be installed (`pip install trl`) if an arm is its.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from eqx_specgrpo.bench import whole_numbers
from eqx_specgrpo.records import read_records

HERE = Path(__file__).parent
ARMS = ("speculative", "plain", "trl-float32", "trl-bfloat16", "trl-bfloat16_weights")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs of ours and of TRL's, compared.")
    parser.add_argument("config", type=Path, help="TOML file, as for specgrpo run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--draft", help="for the speculative arm: folder of a saved draft, or a kind")
    parser.add_argument("--arms", default="speculative,plain,trl-float32", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=46)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of ours; by default the configuration's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all; repeatable")
    parser.add_argument("--skip", type=int, default=2, help="first steps to leave out of medians: they compile")
    parser.add_argument("--threshold", type=float, help="mean reward of ten steps to say when it is reached")
    arguments = parser.parse_args()
    arguments.arms = arguments.arms.split(",")
    unknown = set(arguments.arms) - set(ARMS)
    if unknown:
        parser.error(f"--arms: {', '.join(sorted(unknown))} is none of {', '.join(ARMS)}")
    if "speculative" in arguments.arms and not arguments.draft:
        parser.error("--draft is missing: the speculative arm needs one")
    return arguments


def command(arguments: argparse.Namespace, arm: str, seed: int, folder: Path) -> list[str]:
    """What makes one run."""
    overrides = [f"--set={text}" for text in arguments.set]
    if arm.startswith("trl-"):
        script = [sys.executable, str(HERE / "trl_run.py"), "--config", str(arguments.config)]
        own = [f"--set=model.path={arguments.model}", f"--seed={seed}", f"--dtype={arm.removeprefix('trl-')}"]
    else:
        script = [sys.executable, "-c", "from eqx_specgrpo.cli import main; main()", "run", str(arguments.config)]
        own = [f"--model={arguments.model}", f"--set=seed={seed}"]
        own += [f"--set=model.dtype={arguments.dtype}"] if arguments.dtype else []
        speculative = ["--set=draft.mode=online", f"--draft={arguments.draft}"]
        own += speculative if arm == "speculative" else ["--set=draft.mode=off"]
    return [*script, *own, *overrides, f"--steps={arguments.steps}", f"--out={folder}"]


def is_there(folder: Path, asked: dict[str, Any], steps: int) -> bool:
    """Whether the run was made to its end. What is left of one that was stopped is removed.

    **Raises:**

    `SystemExit` if what is in the folder was asked for otherwise, or is not known to be of this script.
    """
    note = folder.with_name(f"{folder.name}.json")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        return False
    if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != asked:
        raise SystemExit(f"{folder} is a run of other settings (see {note}): choose another --out, or move it away")
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and len(read_records(metrics)) >= steps:
        return True
    shutil.rmtree(folder)
    return False


def main() -> int:
    arguments = parse_arguments()
    folders: dict[str, list[str]] = {}
    config = arguments.config.read_text(encoding="utf-8")
    for seed in whole_numbers("--seeds", arguments.seeds):
        for arm in arguments.arms:  # Arms take turns: the machine may be slower in an hour.
            folder = arguments.out / "runs" / f"{arm}-{seed}"
            folders.setdefault(arm, []).append(str(folder))
            made_by = command(arguments, arm, seed, folder)
            if is_there(folder, {"command": made_by, "config": config}, arguments.steps):
                print(f"{folder} is there", flush=True)
                continue
            print(f"{folder} ...", flush=True)
            code = subprocess.run(made_by, check=False).returncode
            if code != 0:
                print(f"{arm}, seed {seed}, ended with code {code}", file=sys.stderr)
                return code
    arms = [f"{arm}={','.join(paths)}" for arm, paths in folders.items()]
    options = [f"--out={arguments.out}", f"--skip={arguments.skip}"]
    options += [] if arguments.threshold is None else [f"--threshold={arguments.threshold}"]
    return subprocess.run([sys.executable, str(HERE / "compare_runs.py"), *options, *arms], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
