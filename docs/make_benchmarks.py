"""Writes the tables of docs/benchmarks.md from what `python benchmarks/page.py` has measured.

    python docs/make_benchmarks.py

The figures are those of benchmarks/results/page/*.json. A test compares the page with what this script would write.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "benchmarks.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "page"
Record = dict[str, Any]
_NOT_YET = "Not measured on this engine yet: see [earlier results](../benchmarks/results/README.md)."


def _rollouts(found: Record) -> Iterator[str]:
    yield "| policy | rows | plain, tokens/s | 1 guess | 2 guesses | adaptive | plain round, ms |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for policy in ("raw", "tuned"):
        (record,) = found[policy]["results"]
        entropy = record["policy"]["entropy"]
        for rows in sorted({row["rows"] for row in record["results"]}):
            arms = {row["length"]: row for row in record["results"] if row["rows"] == rows}
            plain = arms[0]
            milliseconds = 1e3 * plain["by_rows"][str(rows)]["seconds_per_round"]["median"]
            ratios = " | ".join(_spread(arms[length]["ratio"]) for length in (1, 2, "adaptive"))
            rate = plain["tokens_per_second"]["median"]
            yield f"| {policy}, {entropy:.1f} nats | {rows} | {rate:.0f} | {ratios} | {milliseconds:.0f} |"


def _step(found: Record) -> Iterator[str]:
    (record,) = found["results"]
    yield "| run | a step, s | rollout | update | draft | over ours |"
    yield "| --- | --- | --- | --- | --- | --- |"
    skip = record.get("skip", 2)
    ours = None
    for arm in record["arms"]:
        (run,) = arm["runs"]
        seconds = {phase: statistics.median(run[f"time/{phase}"][skip:]) for phase in ("step", "rollout", "update")}
        draft = statistics.median(run["time/draft"][skip:]) if any(run.get("time/draft", ())) else 0.0
        ours = seconds["step"] if ours is None else ours
        over = "" if arm["name"] == "speculative" else f"{seconds['step'] / ours:.2f}"
        told = f"{draft:.2f}" if draft else ""
        yield (
            f"| {_ARMS[arm['name']]} | {seconds['step']:.1f} | {seconds['rollout']:.1f} | {seconds['update']:.1f} | "
            f"{told} | {over} |"
        )


_ARMS = {
    "speculative": "speculative, adaptive length, learning Hydra heads",
    "plain": "plain",
    "trl-bfloat16": "TRL, bfloat16 (autocast, its default)",
    "trl-float32": "TRL, float32",
}


def _runs(found: Record) -> Iterator[str]:
    (record,) = found["results"]
    rows: list[tuple[str, Callable[[Record], float], str]] = [
        ("all steps, s", lambda run: sum(run["time/step"]), ".1f"),
        ("rollouts, s", lambda run: sum(run["time/rollout"]), ".1f"),
        ("rollouts from step 41 on, s", lambda run: sum(run["time/rollout"][40:]), ".1f"),
        ("the draft's updates, s", lambda run: sum(run.get("time/draft", [0.0])), ".1f"),
        ("acceptance length, last ten steps", lambda run: statistics.mean(run["spec/acceptance_length"][-10:]), ".2f"),
        ("reward, first ten steps", lambda run: statistics.mean(run["reward"][:10]), ".2f"),
        ("reward, last ten steps", lambda run: statistics.mean(run["reward"][-10:]), ".2f"),
    ]
    arms = {arm["name"]: arm["runs"] for arm in record["arms"]}
    yield f"| | {' | '.join(arms)} |"
    yield f"| --- |{' --- |' * len(arms)}"
    for name, value, form in rows:
        cells = [_of_seeds([value(run) for run in runs], form) for runs in arms.values()]
        yield f"| {name} | {' | '.join(cells)} |"


def _memory(found: Record) -> Iterator[str]:
    (record,) = found["results"]
    yield "| completions x new tokens | layers' values kept, GiB | computed again, GiB | what a run does |"
    yield "| --- | --- | --- | --- |"
    for update in record["updates"]:
        kept, again = (
            f"{update[way]['bytes'] / 2**30:.2f} ({update[way]['estimate'] / 2**30:.2f})"
            for way in ("kept", "checkpointed")
        )
        chosen = "computes them again" if update["chosen"] else "keeps them"
        yield f"| {update['rows']} x {update['new']:,} | {kept} | {again} | {chosen} |"


def _drafts(found: Record) -> Iterator[str]:
    yield "| draft | parameters | updates | guesses | acceptance length | round over plain | tokens/s over plain |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for record in found["results"]:
        for row in record["results"]:
            if row["draft"] == "plain":
                continue
            (draft,) = record["drafts"]
            updates = draft["prepared"].get("updates", "")
            yield (
                f"| `{record['kind']}` | {draft['parameters']:,} | {updates} | {row['length']} | "
                f"{row['acceptance_length']:.2f} | {row['cost_ratio']['median']:.2f} | {_spread(row['ratio'])} |"
            )


def _spread(ratio: Record) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def _of_seeds(values: list[float], form: str) -> str:
    spread = f" ({min(values):{form}}-{max(values):{form}})" if max(values) > min(values) else ""
    return f"{statistics.mean(values):{form}}{spread}"


def _origin(*found: Record) -> Iterator[str]:
    """Where the figures come from: the command, the machine and the commit of each measurement."""
    yield "\n```bash"
    yield from (one["command"] for one in found)
    yield "```\n"
    about = [machine for one in found for record in one["results"] for machine in _machines(record)]
    told = {
        f"{machine['processor']}, {machine['cores']} cores; jax {machine['versions']['jax']}; commit "
        f"{machine.get('commit') or 'unknown'}, {machine['time'][:10]}"
        for machine in about
    }
    yield "Measured on: " + "; ".join(sorted(told)) + "."


def _machines(record: Record) -> list[Record]:
    if "about" in record:
        return [record["about"]]
    return [start for arm in record["arms"] for run in arm["machines"] for start in run]


def _with_origin(table: Callable[[Record], Iterator[str]], found: Record) -> list[str]:
    return [*table(found), *_origin(found)]


def sections() -> dict[str, list[str]]:
    """The lines of each section."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    tables = {"step": _step, "runs": _runs, "memory": _memory, "drafts": _drafts}
    lines = {name: [_NOT_YET] for name in (*tables, "rollouts")}
    lines |= {name: _with_origin(table, found[name]) for name, table in tables.items() if name in found}
    if "rollouts" in found:
        both = [found["rollouts"][policy] for policy in ("raw", "tuned")]
        lines["rollouts"] = [*_rollouts(found["rollouts"]), *_origin(*both)]
    return lines


def page(old: str) -> str:
    """The page with its tables made anew."""
    for name, lines in sections().items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, found_begin, rest = old.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ValueError(f"{PAGE} has lost its marks {begin.strip()} and {end.strip()}: put them back")
        text = "\n".join(lines)
        old = f"{before}{begin}\n{text}\n\n{end}{after}"
    return old


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
