"""Everything that a GPU has to be asked, in eight minutes.

    python benchmarks/gpu.py --out results/gpu             # goes on where it stopped: parts that are there are kept
    python benchmarks/gpu.py --out results/gpu --part rollouts
    python benchmarks/gpu.py --out results/gpu --tiny      # a minute on a CPU: does the script still work?

In order of worth: is speculation lossless here (`exactness`); what does a round cost by rows, and how much of the
memory's bandwidth is that (`rollouts`); whole runs with a policy that is pretrained on the spot, with and without
speculation (`runs`); an update and a rollout of a 1.7B-shaped model with LoRA, its peak memory beside the compiler's
plan (`large`). Each part is a process with a limit of its own, so that none takes another's memory or time. What a part
found goes to `gpu.json` when it ends, what it says to `PART.log` as it goes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Seconds for each part, in the order in which they are run.
LIMITS = {"exactness": 90, "rollouts": 120, "runs": 210, "large": 60}


def run_part(name: str, out: Path, tiny: bool) -> int:
    """In this process."""
    from gpu_parts import PARTS, TINY, Sizes

    from eqx_specgrpo.records import machine

    with tempfile.TemporaryDirectory() as folder:
        record = {"about": machine(), "seconds": time.perf_counter()}
        record |= PARTS[name](TINY if tiny else Sizes(), Path(folder), lambda text: print(text, flush=True))
    record["seconds"] = time.perf_counter() - record["seconds"]
    (out / f"{name}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return 0


def keep(out: Path, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Adds a part to `gpu.json`."""
    path = out / "gpu.json"
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    whole[name] = record
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return whole


def table(whole: dict[str, Any]) -> str:
    """What was found, in lines."""
    lines = [f"device: {next((part['about']['device'] for part in whole.values() if 'about' in part), 'none')}"]
    for name, part in whole.items():
        if "failed" in part:
            lines.append(f"{name}: {part['failed']}")
    for dtype, of in whole.get("exactness", {}).get("models", {}).items():
        differ = ", ".join(
            f"{of[kind]['rows_that_differ']} of {of[kind]['rows']} {kind}" for kind in ("greedy", "coupled")
        )
        lines.append(
            f"{dtype}: rows that differ from plain decoding: {differ}; gap of log-probabilities {of['logprob_gap']}"
        )
    for of in whole.get("rollouts", {}).get("rounds", []):
        if of["milliseconds"] is not None:
            share = of["share_of_bandwidth"]
            read = "" if share is None else f", {share:.0%} of the bandwidth"
            lines.append(f"{of['rows']} rows, {of['length']} guesses: {of['milliseconds']:.2f} ms a round{read}")
    runs = whole.get("runs", {})
    if all(runs.get(name, {}).get("steps") for name in ("plain", "speculative")):
        for what in ("time/rollout", "time/step"):
            # The first step compiles.
            sums = {name: sum(step[what] for step in runs[name]["steps"][1:]) for name in ("plain", "speculative")}
            if sums["speculative"] > 0:
                lines.append(
                    f"{what} after the first step: plain over speculative {sums['plain'] / sums['speculative']:.2f}"
                )
    if "planned_bytes" in whole.get("large", {}):
        of = whole["large"]
        lines.append(
            f"large update: {min(of['update_seconds']):.2f} s, planned {of['planned_bytes']}, peak {of['peak_bytes']}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json")
    parser.add_argument("--part", choices=LIMITS, help="this one alone, again if it is there")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.inside:
        return run_part(asked.part, asked.out, asked.tiny)
    path = asked.out / "gpu.json"
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    failed = False
    for name, limit in LIMITS.items():
        limit *= 10 if asked.tiny else 1  # a CPU that others share
        there = whole.get(name)
        if asked.part not in (None, name) or (asked.part is None and there is not None and "failed" not in there):
            continue
        print(f"{name}, at most {limit} s ...", flush=True)
        command = [sys.executable, __file__, "--inside", "--part", name, "--out", str(asked.out)]
        with (asked.out / f"{name}.log").open("w", encoding="utf-8") as log:
            try:
                status = subprocess.run(
                    [*command, *(["--tiny"] if asked.tiny else [])], stdout=log, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
                trouble = f"ended with {status}, see {log.name}" if status else None
            except subprocess.TimeoutExpired:
                trouble = f"took more than {limit} s, see {log.name}"
        if trouble is None:
            record = json.loads((asked.out / f"{name}.json").read_text(encoding="utf-8"))
        else:
            record, failed = {"failed": trouble}, True
            print(f"  {trouble}", flush=True)
        whole = keep(asked.out, name, record)
    print(table(whole))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
