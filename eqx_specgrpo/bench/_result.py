"""From raw figures of a benchmark to rates, ratios and spreads; as JSON, as a table, as a picture."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
from rich import box
from rich.table import Table

from ._measure import PLAIN, ArmRun


class BenchResult(eqx.Module):
    """A benchmark.

    **Arguments:**

    - `settings`, `about`: what was asked for; machine and versions.
    - `model`: its name and sizes.
    - `policy`: its entropy, nats a token, and what that was measured on.
    - `drafts`: for each its name and sizes, how it was prepared, and its expected acceptance by position.
    - `runs`: the raw figures.
    - `compile_seconds`: by number of rows, then by arm.
    """

    settings: dict[str, Any]
    about: dict[str, Any]
    model: dict[str, Any]
    policy: dict[str, Any]
    drafts: list[dict[str, Any]]
    runs: tuple[ArmRun, ...]
    compile_seconds: dict[str, dict[str, float]]

    def results(self) -> list[dict[str, Any]]:
        """See [`summarize`][]; with what teacher-forced acceptance lets expect, where it was computed."""
        expected = {draft["name"]: draft["expected_acceptance"] for draft in self.drafts}
        rows = summarize(self.runs, self.settings["max_rows"])
        for row in rows:
            acceptance, length = expected.get(row["draft"]), row["length"]
            row["expected_acceptance_length"] = (
                expected_length(acceptance, length) if acceptance is not None and isinstance(length, int) else None
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object, raw figures included."""
        return {
            "settings": self.settings,
            "about": self.about,
            "model": self.model,
            "policy": self.policy,
            "drafts": self.drafts,
            "compile_seconds": self.compile_seconds,
            "results": self.results(),
            "runs": [run.to_json() for run in self.runs],
        }

    def table(self) -> Table:
        """For people."""
        rounds = self.settings["rounds"]
        title = f"{self.model['name']}: {self.policy['entropy']:.2f} nats a token, medians of {rounds} rounds (min-max)"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("rows", justify="right", no_wrap=True)
        table.add_column("draft", overflow="fold")
        table.add_column("verifier", no_wrap=True)
        table.add_column("length", justify="right", no_wrap=True)
        for heading in ("tokens/s", "ratio", "accept.\nlength", "expec-\nted", "round\ncosts"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("accepted by position", overflow="fold")
        before = None
        for row in self.results():
            if before not in (None, row["rows"]):
                table.add_section()
            expected, cost = row["expected_acceptance_length"], row["cost_ratio"]
            is_plain = row["draft"] == PLAIN
            table.add_row(
                "" if row["rows"] == before else str(row["rows"]),
                row["draft"],
                "" if is_plain else row["verifier"],
                str(row["length"]),
                f"{row['tokens_per_second']['median']:.0f}",
                "1" if is_plain else _with_spread(row["ratio"]),
                f"{row['acceptance_length']:.2f}",
                "" if expected is None else f"{expected:.2f}",
                "" if cost is None or is_plain else f"{cost['median']:.2f}",
                " ".join(f"{rate:.2f}" for rate in row["acceptance_rate_by_position"]),
                style="dim" if is_plain else "bold" if row["ratio"]["min"] > 1 else "",
            )
            before = row["rows"]
        return table

    def footnote(self) -> str:
        """What the table leaves out."""
        compiled = sum(sum(arms.values()) for arms in self.compile_seconds.values())
        stolen = [run.stolen_seconds for run in self.runs if run.stolen_seconds is not None]
        disturbed = (
            f" The host of this virtual machine gave {sum(stolen):.0f} s of its processors' time to others in these "
            f"{sum(run.seconds for run in self.runs):.0f} s."
            if sum(stolen) >= 1
            else ""
        )
        ignored = " Ends of sequence were ignored." if self.settings["ignore_eos"] else ""
        most = self.settings["max_rows"]
        held_back = (
            f" At most {most} rows were decoded at a time (grpo.max_rows), and round costs are of so many."
            if most is not None
            else ""
        )
        return (
            "ratio: tokens a second over plain decoding's in the same round. round costs: seconds of a round with all "
            "rows over plain decoding's. expected: acceptance length by the draft's probabilities on the policy's own "
            f"completions. Compilation, {compiled:.0f} s, is left out. Other work on the machine moves all times: "
            f"trust no ratio whose spread holds 1.{disturbed}{ignored}{held_back}"
        )


def summarize(runs: Sequence[ArmRun], max_rows: int | None = None) -> list[dict[str, Any]]:
    """For each number of rows and each arm: rates, and ratios to plain decoding in the same round.

    **Arguments:**

    - `runs`: plain decoding among them, in every round.
    - `max_rows`: how many rows were decoded at a time; `None` for all.

    **Returns:**

    JSON-able objects, plain decoding first. Spreads have `median`, `min` and `max` over the rounds.

    - `tokens_per_second`: of the whole call, over all rows.
    - `ratio`: of it to plain decoding's in the same round.
    - `acceptance_length`: tokens a round of a row, all rounds taken together.
    - `acceptance_rate_by_position`: share of the rounds in which a position was drafted that kept it.
    - `draft_length`: tokens drafted a round of a row, on average.
    - `by_rows`: for each number of rows of the compiled program: how many rounds were run with it, `seconds_per_round`,
        and `tokens_per_round` of an active row. Rows finish at different times in different arms, but a round's cost
        depends on the program alone.
    - `cost_ratio`: of a round with all rows that are decoded at a time, to plain decoding's; `None` where either arm
        had none.
    - `predicted_ratio`: `acceptance_length` over the median of `cost_ratio`. It leaves out the prompts' pass, the last
        rows, and the time between segments, so `ratio` can be below.
    """
    found = []
    for rows in dict.fromkeys(run.rows for run in runs):
        arms: dict[tuple, list[ArmRun]] = {}
        for run in sorted((run for run in runs if run.rows == rows), key=lambda run: run.round):
            arms.setdefault((run.draft, run.verifier, run.length), []).append(run)
        plain = {run.round: run for arm, its in arms.items() if arm[0] == PLAIN for run in its}
        for arm in sorted(arms, key=lambda arm: arm[0] != PLAIN):
            found.append(_summary(rows, rows if max_rows is None else min(rows, max_rows), arms[arm], plain))
    return found


def _summary(rows: int, at_once: int, runs: list[ArmRun], plain: Mapping[int, ArmRun]) -> dict[str, Any]:
    first = runs[0]
    forwards = sum(run.target_forwards for run in runs)
    drafted, accepted = ([sum(counts) for counts in zip(*(run.__dict__[name] for run in runs), strict=True)]
                         for name in ("drafted", "accepted"))  # fmt: skip
    costs = []
    for run in runs:
        own, of_plain = _seconds_per_round([run], at_once), _seconds_per_round([plain[run.round]], at_once)
        if own is not None and of_plain is not None:
            costs.append(own / of_plain)
    acceptance_length = sum(run.emitted for run in runs) / max(forwards, 1)
    cost_ratio = _spread(costs) if costs else None
    return {
        "rows": rows,
        "draft": first.draft,
        "verifier": first.verifier,
        "length": first.length,
        "tokens_per_second": _spread([_rate(run) for run in runs]),
        "ratio": _spread([_rate(run) / _rate(plain[run.round]) for run in runs]),
        "acceptance_length": acceptance_length,
        "acceptance_rate_by_position": [a / max(d, 1) for a, d in zip(accepted, drafted, strict=True)],
        "draft_length": sum(drafted) / max(forwards, 1),
        "mean_completion_length": sum(run.tokens for run in runs) / (rows * len(runs)),
        "by_rows": _by_rows(runs),
        "cost_ratio": cost_ratio,
        "predicted_ratio": None if cost_ratio is None else acceptance_length / cost_ratio["median"],
    }


def _rate(run: ArmRun) -> float:
    return run.tokens / run.seconds


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _seconds_per_round(runs: Iterable[ArmRun], rows: int) -> float | None:
    segments = [segment for run in runs for segment in run.segments if segment["rows"] == rows]
    rounds = sum(segment["rounds"] for segment in segments)
    return sum(segment["seconds"] for segment in segments) / rounds if rounds else None


def _by_rows(runs: Sequence[ArmRun]) -> dict[str, dict[str, Any]]:
    sizes = sorted({segment["rows"] for run in runs for segment in run.segments}, reverse=True)
    found = {}
    for size in sizes:
        of_size = [segment for run in runs for segment in run.segments if segment["rows"] == size]
        times = [seconds for run in runs if (seconds := _seconds_per_round([run], size)) is not None]
        active = sum(segment["active_rounds"] for segment in of_size)
        found[str(size)] = {
            "rounds": sum(segment["rounds"] for segment in of_size),
            "seconds_per_round": _spread(times),
            "tokens_per_round": sum(segment["tokens"] for segment in of_size) / max(active, 1),
        }
    return found


def expected_length(acceptance: Sequence[float], length: int) -> float:
    """Acceptance length under `Rejection` by the acceptance of each position, as if positions were independent:
    `1 + a_1 + a_1 a_2 + ...` (Leviathan et al. 2023, section 3.1, with a rate of its own for each position).

    **Arguments:**

    - `acceptance`: `sum min(target, draft)` at each position, given that those before it were kept; further positions
        are taken to be like the last.
    - `length`: tokens drafted a round.
    """
    total, survival = 1.0, 1.0
    for position in range(length):
        survival *= acceptance[min(position, len(acceptance) - 1)]
        total += survival
    return total


def _with_spread(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})"
