"""What a run has come to: a table at its end."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ._speculation import Comparison, speculation_balance
from ._times import STEP_PHASES, seconds_by_phase

_WINDOW = 5
_CURVES = (("reward", "Reward"), ("spec/acceptance_length", "Acceptance length"))


def first_to_last(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    """Means over the first five and the last five steps; in a run of under ten steps, over its halves.

    Steps without the key, or with `null` there, are left out; `None` if none is left.
    """
    values = _values(metrics, key)
    if not values:
        return None
    window = _window(len(values))
    return sum(values[:window]) / window, sum(values[-window:]) / window


def phase_times(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds spent in each phase over all steps; `other` is what of `time/step` no phase accounts for."""
    times = {phase: sum(values) for phase in STEP_PHASES if (values := _values(metrics, f"time/{phase}"))}
    total = sum(_values(metrics, "time/step"))
    other = total - sum(times.values())
    return times | {"other": other} if times and other > 0 else times


def rounds_by_length(metrics: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Rounds of decoding with each draft length over all steps, shortest first."""
    prefix = "spec/rounds_length_"
    lengths = sorted({int(key.removeprefix(prefix)) for record in metrics for key in record if key.startswith(prefix)})
    return {length: sum(_values(metrics, f"{prefix}{length}")) for length in lengths}


def run_summary(
    metrics: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]] = (),
    comparison: Comparison | None = None,
) -> dict[str, float]:
    """The figures of [`summary_table`][] that are one number each, for trackers; those that are not known are left out.

    **Arguments:**

    - `metrics`, `starts`, `comparison`: as for [`summary_table`][].
    """
    summary: dict[str, float] = {}
    for key, _ in _CURVES:
        ends = first_to_last(metrics, key)
        if ends is not None:
            name = key.rpartition("/")[2]
            summary |= {f"summary/{name}_first": ends[0], f"summary/{name}_last": ends[1]}
    if starts and starts[0]["from_step"] == 1:
        summary["summary/seconds"] = sum(start["total"] for start in starts)
    if comparison is not None:
        summary |= {
            "summary/tokens_per_second": comparison.speculative,
            "summary/tokens_per_second_plain": comparison.plain,
            "summary/speculation_ratio": comparison.ratio,
        }
    balance = speculation_balance(metrics, starts, comparison)
    if balance is not None:
        summary["summary/seconds_saved"] = balance.total
    return summary


def summary_table(
    metrics: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]] = (),
    comparison: Comparison | None = None,
) -> Table:
    """The end of a run on one screen: reward and acceptance length first to last, where its time went, what was
    drafted, and what that gave.

    **Arguments:**

    - `metrics`: the records of `metrics.jsonl`, times in seconds.
    - `starts`: those of `times.jsonl`; without them only the times of the steps are known.
    - `comparison`: what was measured against plain decoding.
    """
    table = Table(box=box.SIMPLE_HEAD, title=f"Summary of {len(metrics)} steps", title_justify="left")
    for name in ("", "first", "last", "change"):
        table.add_column(name, justify="left" if not name else "right")
    rounds = rounds_by_length(metrics)
    drafted = set(rounds) != {0}
    for key, label in _CURVES:
        ends = first_to_last(metrics, key)
        if ends is not None and (drafted or key != "spec/acceptance_length"):
            window = _window(len(_values(metrics, key)))
            label = f"{label} (mean of {window} step{'s' if window > 1 else ''})"
            table.add_row(label, f"{ends[0]:.3f}", f"{ends[1]:.3f}", f"{ends[1] - ends[0]:+.3f}")
    if starts and starts[0]["from_step"] == 1:
        _add_times(table, starts)
    else:
        _add_times_of_steps(table, metrics)
    if len(rounds) > 1 or (comparison is not None and not drafted):
        # An adaptive length, even if it never drafted.
        table.add_section()
        table.add_row("Draft length", "rounds", "share", "", style="bold")
        for length, count in rounds.items():
            label = f"  {length}" if length else "  0 (plain decoding)"
            table.add_row(label, f"{count:.0f}", f"{count / sum(rounds.values()):.0%}", "")
    if comparison is not None:
        table.add_section()
        table.add_row("Against plain decoding", "tokens/s", "plain", "ratio", style="bold")
        rates = f"{comparison.speculative:.0f}", f"{comparison.plain:.0f}"
        table.add_row(f"  rollouts after step {comparison.steps}", *rates, f"{comparison.ratio:.2f}x")
    balance = speculation_balance(metrics, starts, comparison)
    if balance is not None:
        table.add_section()
        table.add_row("Saved by speculation, if above 0", "seconds", "", "", style="bold")
        table.add_row(f"  rollouts ({balance.basis})", f"{balance.rollouts:+.1f}", "", "")
        table.add_row("  learning of the draft", f"{balance.draft:+.1f}", "", "")
        table.add_row("  compiling for it", f"{balance.compiling:+.1f}", "", "")
        table.add_row("  in all", f"{balance.total:+.1f}", "", "")
    return table


def _add_times(table: Table, starts: Sequence[Mapping[str, Any]]) -> None:
    """The whole wall-clock time, which the phases add up to."""
    total = sum(start["total"] for start in starts)
    phases = seconds_by_phase(starts)
    table.add_section()
    table.add_row("Time", "seconds", "share", "compiling", style="bold")
    for phase, (seconds, compiling) in phases.items():
        table.add_row(f"  {phase}", f"{seconds:.1f}", f"{seconds / total:.0%}", f"{compiling:.1f}")
    label = "  in all" if len(starts) == 1 else f"  in all, of {len(starts)} starts"
    table.add_row(label, f"{total:.1f}", "", f"{sum(compiling for _, compiling in phases.values()):.1f}")


def _add_times_of_steps(table: Table, metrics: Sequence[Mapping[str, Any]]) -> None:
    times = phase_times(metrics)
    total = sum(_values(metrics, "time/step")) or sum(times.values())
    if times:
        table.add_section()
        table.add_row("Time", "seconds", "share", "", style="bold")
        for phase, seconds in times.items():
            table.add_row(f"  {phase}", f"{seconds:.1f}", f"{seconds / total:.0%}" if total else "", "")
        table.add_row("  all steps", f"{total:.1f}", "", "")


def summary_text(
    metrics: Sequence[Mapping[str, Any]],
    starts: Sequence[Mapping[str, Any]] = (),
    comparison: Comparison | None = None,
) -> str:
    """[`summary_table`][] without colours, for files."""
    console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(summary_table(metrics, starts, comparison))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _values(metrics: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(record[key]) for record in metrics if record.get(key) is not None]


def _window(count: int) -> int:
    return max(1, min(_WINDOW, count // 2))
