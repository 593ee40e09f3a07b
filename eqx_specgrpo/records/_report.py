"""What a run has come to: a table at its end, and its curves as a picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ._folder import read_steps
from ._speculation import Comparison, speculation_balance
from ._times import STEP_PHASES, seconds_by_phase

_WINDOW = 5
_CURVES = (
    ("reward", "Reward", "mean of a step"),
    ("spec/acceptance_length", "Acceptance length", "tokens per target pass"),
)


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
    for key, label, _ in _CURVES:
        ends = first_to_last(metrics, key)
        if ends is not None:
            window = _window(len(_values(metrics, key)))
            label = f"{label} (mean of {window} step{'s' if window > 1 else ''})"
            table.add_row(label, f"{ends[0]:.3f}", f"{ends[1]:.3f}", f"{ends[1] - ends[0]:+.3f}")
    if starts and starts[0]["from_step"] == 1:
        _add_times(table, starts)
    else:
        _add_times_of_steps(table, metrics)
    rounds = rounds_by_length(metrics)
    if len(rounds) > 1 or (comparison is not None and set(rounds) == {0}):
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
        table.add_row("  warm-up and learning of the draft", f"{balance.draft:+.1f}", "", "")
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


def plot_run(run_folder: Path) -> Path:
    """Draws reward, acceptance length and time by phase over the steps of a run, into `curves.png` of its folder.

    **Returns:**

    The path of the picture.

    **Raises:**

    `UserError` without matplotlib (extra `plot`), or if the folder holds no metrics.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('drawing needs matplotlib: pip install "eqx_specgrpo[plot]"') from None
    path = run_folder / "metrics.jsonl"
    metrics = read_steps(path)
    if not metrics:
        raise UserError(f"{path} holds no steps yet: let the run do at least one")
    # A `Figure` of its own, not `pyplot`: nothing global, and no display is needed.
    figure = Figure(figsize=(7.5, 8.5), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (key, title, unit), color in zip(panels, _CURVES, ("#1b6ca8", "#c8553d"), strict=False):
        points = [(record["step"], record[key]) for record in metrics if record.get(key) is not None]
        steps, values = [point[0] for point in points], [point[1] for point in points]
        axes.plot(steps, values, color=color, alpha=0.35, linewidth=1, label="step")
        axes.plot(steps, _smooth(values), color=color, linewidth=2, label=f"mean of {_WINDOW} steps")
        axes.set_title(title, loc="left")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
    panels[1].axhline(1.0, color="0.4", linestyle="--", linewidth=1, label="plain decoding")
    for axes in panels[:2]:
        axes.legend(frameon=False, fontsize="small")
    _draw_times(panels[2], metrics)
    target = run_folder / "curves.png"
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error.strerror}") from error
    return target


def _draw_times(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    steps = [record["step"] for record in metrics]
    below = [0.0] * len(metrics)
    for phase, color in zip(STEP_PHASES, ("#1b6ca8", "#e0a030", "#5a8f5a", "#c8553d"), strict=True):
        seconds = [record.get(f"time/{phase}") or 0.0 for record in metrics]
        if any(seconds):
            axes.bar(steps, seconds, bottom=below, width=1.0, color=color, label=phase)
            below = [low + high for low, high in zip(below, seconds, strict=True)]
    axes.set_title("Time", loc="left")
    axes.set_ylabel("seconds a step")
    axes.set_xlabel("step")
    # The first steps compile, and would flatten all others: the axis ends a little above the usual step.
    usual = sorted(below)[int(0.9 * (len(below) - 1))]
    if usual > 0:
        axes.set_ylim(0, 1.3 * usual)
    if any(below):
        axes.legend(frameon=False, fontsize="small", ncols=len(STEP_PHASES))


def _values(metrics: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(record[key]) for record in metrics if record.get(key) is not None]


def _window(count: int) -> int:
    return max(1, min(_WINDOW, count // 2))


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and up to four before it."""
    windows = [values[max(0, end - _WINDOW) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]
