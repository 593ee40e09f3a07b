"""Everything that docs/benchmarks.md shows, one part after the other.

    python benchmarks/page.py --model path/to/SmolLM2-135M-Instruct --out results/page            # about two hours
    python benchmarks/page.py --model path/to/SmolLM2-135M-Instruct --out results/page --only rollouts,memory
    python docs/make_benchmarks.py                                                                 # writes the tables

Each part is one or two of the other scripts with the settings of the page; the commands are printed, and can be run by
hand. What a part needs (a tuned policy and drafts that have learned) is made first, and kept in `OUT/work`. A part that
is there is not made again. What the tables need of each result goes to benchmarks/results/page/, with machine, commit
and the command. Run it on a machine that does nothing else. The step beside TRL needs `pip install trl`.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eqx_specgrpo.config import default_model_path

HERE = Path(__file__).parent
KEPT = HERE / "results" / "page"
SPECGRPO = [sys.executable, "-c", "from eqx_specgrpo.cli import main; main()"]
# Left out of what is kept: every segment of every decoding.
BULKY = ("runs", "compile_seconds")


class Place:
    """Where things are: the model, the work folder and the dtype computed in."""

    def __init__(self, model: Path, out: Path, dtype: str):
        self.model, self.out, self.dtype = model.resolve(), out.resolve(), dtype
        self.work = self.out / "work"
        self.sums, self.tuned = self.work / "sums.jsonl", self.work / "runs" / "tuned"
        self.drafts = {policy: self.work / "drafts" / policy for policy in ("raw", "tuned")}

    def prepare(self) -> None:
        """The lists of sums, a policy after ten steps of GRPO on them, and Hydra heads for both policies."""
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.sums.exists():
            _call([sys.executable, str(HERE / "many_sums.py"), str(self.sums)])
        if not (self.tuned / "policy").exists():
            shutil.rmtree(self.tuned, ignore_errors=True)
            rewards = f"--reward={HERE / 'many_sums.py'}:sums_right"
            keys = ("grpo.prompts_per_step=2", "draft.mode=off", "grpo.max_completion_length=128")
            keys += ("grpo.learning_rate=2e-5", "grpo.lr_scheduler_type=constant", f"model.dtype={self.dtype}")
            _call(
                [*SPECGRPO, "run", f"--model={self.model}", f"--task={self.sums}", rewards, "--steps=10"]
                + [f"--set={key}" for key in keys]
                + [f"--out={self.tuned}"]
            )
        for policy, folder in self.drafts.items():
            if not folder.exists():
                model, task = self.policy(policy)
                keys = ("draft.learning_rate=2e-3", "grpo.num_generations=4", f"model.dtype={self.dtype}")
                _call(
                    [*SPECGRPO, "distill", f"--model={model}", f"--task={task}", "--draft=hydra", "--steps=120"]
                    + ["--prompts=4", "--max-completion-length=128", *(f"--set={key}" for key in keys)]
                    + [f"--out={folder}"]
                )

    def policy(self, name: str) -> tuple[Path, str]:
        """The model of a policy, and the task that it is measured on."""
        return (self.model, "arithmetic") if name == "raw" else (self.tuned / "policy", str(self.sums))


def rollouts(place: Place) -> dict[str, Any]:
    """Tokens a second by the number of rows: plain, with 1 to 3 guesses, adaptive; and transformers."""
    place.prepare()
    found = {}
    for policy in ("raw", "tuned"):
        model, task = place.policy(policy)
        command = [sys.executable, str(HERE / "rollout.py"), f"--out={place.out / 'rollouts' / policy}"]
        command += [f"--model={model}", f"--set=task.name={task}", f"--draft={place.drafts[policy]}"]
        command += [f"--dtype={place.dtype}", "--rows=16,4,1", "--lengths=1,2", "--rounds=6", "--ignore-eos"]
        command += ["--transformers-rows="]
        found[policy] = _measured(place, command, place.out / "rollouts" / policy / "rollout.json")
    return found


def step(place: Place) -> dict[str, Any]:
    """A step of GRPO by phase, beside TRL's."""
    place.prepare()
    command = [sys.executable, str(HERE / "against_trl.py"), str(HERE / "sums.toml"), f"--out={place.out / 'step'}"]
    command += [f"--model={place.tuned / 'policy'}", f"--draft={place.drafts['tuned']}", f"--dtype={place.dtype}"]
    command += ["--steps=5", "--skip=2", "--arms=speculative,plain,trl-bfloat16,trl-float32"]
    command += [f"--set=task.name={place.sums}"]
    return _measured(place, command, place.out / "step" / "runs.json")


def runs(place: Place) -> dict[str, Any]:
    """Whole runs of the embedded model, with speculation and without, three seeds."""
    preset = Path(default_model_path()).parent / "default.toml"
    command = [sys.executable, str(HERE / "against_trl.py"), str(preset), f"--out={place.out / 'runs'}"]
    command += [f"--model={default_model_path()}", "--draft=medusa", "--steps=100", "--arms=speculative,plain"]
    command += ["--seeds=0,1,2", "--set=compare=false"]
    return _measured(place, command, place.out / "runs" / "runs.json")


def memory(place: Place) -> dict[str, Any]:
    """What an update needs by the length of the completions, as the compiler says."""
    command = [sys.executable, str(HERE / "scaling.py"), "memory", "--both", f"--out={place.out / 'memory'}"]
    return _measured(place, command, place.out / "memory" / "memory.json")


def drafts(place: Place) -> dict[str, Any]:
    """Kinds of draft on the embedded model: each one minute to get ready."""
    command = [sys.executable, str(HERE / "drafts.py"), f"--out={place.out / 'drafts'}", "--policy=embedded"]
    command += ["--kinds=medusa,hydra,markov,eagle,layer_skip,ngram", "--minutes=1", "--lengths=2,4", "--rounds=5"]
    command += ["--verifiers=block", "--seeds=0", "--set=draft.learning_rate=3e-3"]
    command += ["--set=eagle:draft.learning_rate=1e-3"]
    return _measured(place, command, place.out / "drafts" / "results.jsonl")


PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    part.__name__: part for part in (rollouts, step, runs, memory, drafts)
}


def _measured(place: Place, command: list[str], result: Path) -> dict[str, Any]:
    """What a script has written, with the command that made it."""
    if not result.exists():
        _call(command)
    text = _without_places(place, result.read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in text.splitlines()] if result.suffix == ".jsonl" else [json.loads(text)]
    shown = _without_places(place, shlex.join(["python", *command[1:]]))
    return {"command": shown, "results": [_light(line) for line in lines]}


def _without_places(place: Place, text: str) -> str:
    """With names in place of this machine's folders."""
    for path, name in ((place.model, "path/to/SmolLM2-135M-Instruct"), (place.out, "results/page"), (HERE.parent, "")):
        text = text.replace(f"{path}/" if not name else str(path), name)
    return text


def _light(record: dict[str, Any]) -> dict[str, Any]:
    bulky = BULKY if "floor" in record or "policy_entropy" in record else ()
    return {key: value for key, value in record.items() if key not in bulky}


def _call(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of ours")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    place = Place(arguments.model, arguments.out, arguments.dtype)
    KEPT.mkdir(parents=True, exist_ok=True)
    # Written when all is measured: each record names the commit, and whether anything in it was changed.
    for name, found in [(name, PARTS[name](place)) for name in names]:
        (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{KEPT / name}.json", flush=True)


if __name__ == "__main__":
    main()
