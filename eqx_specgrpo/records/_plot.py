"""The curves of a run as a picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._folder import replace_file
from ._record_lines import read_steps
from ._times import STEP_PHASES

_WINDOW = 5
_CURVES = (
    ("reward", "Reward", "mean of a step"),
    ("spec/acceptance_length", "Acceptance length", "tokens per target pass"),
)


def new_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, which is imported only here. Ask for it before the work whose figures are to be drawn.

    **Arguments:**

    - `width`, `height`: in inches.

    **Raises:**

    `UserError` without matplotlib, which only drawing needs (extra `plot`).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib, which is not installed: pip install matplotlib") from None
    # A `Figure` of its own, not `pyplot`: nothing global, and no display is needed.
    return Figure(figsize=(width, height), layout="constrained")


def plot_run(run_folder: Path) -> Path:
    """Draws reward, acceptance length and time by phase over the steps of a run, into `curves.png` of its folder.

    **Returns:**

    The path of the picture.

    **Raises:**

    `UserError` without matplotlib (extra `plot`), or if the folder holds no metrics.
    """
    figure = new_figure(7.5, 8.5)
    path = run_folder / "metrics.jsonl"
    metrics = read_steps(path)
    if not metrics:
        raise UserError(f"{path} holds no steps yet: let the run do at least one")
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
    draw_times(panels[2], metrics)
    return save_figure(figure, run_folder / "curves.png")


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a figure of matplotlib, in the format that the name ends in (PNG without an ending), aside and renamed.

    **Raises:**

    `UserError` if it can't be written; an earlier picture is as it was then.
    """
    content = io.BytesIO()
    name = path.name if path.suffix else f"{path.name}.png"
    try:
        figure.savefig(content, dpi=150, format=Path(name).suffix[1:])
    except ValueError as error:
        raise UserError(f"{path} could not be written: {error}; name a file such as curves.png") from error
    replace_file(path.with_name(name), content.getvalue(), "the picture that was there, if any, is as it was")
    return path.with_name(name)


def draw_times(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Bars of the time by phase, one a step.

    Steps that compile would flatten all others: the axis ends a little above the usual step, and a bar that goes beyond
    it ends in a mark and says how many seconds it is.
    """
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
    usual = sorted(below)[int(0.9 * (len(below) - 1))]
    top = 1.5 * usual  # room for the legend and the marks
    if usual > 0 and max(below) > top:
        axes.set_ylim(0, top)
        for step, seconds in zip(steps, below, strict=True):
            if seconds > top:
                axes.plot([step], [0.97 * top], marker="^", color="0.2", markersize=5)
                axes.annotate(
                    f"{seconds:.0f} s", (step, 0.97 * top), xytext=(5, 0), textcoords="offset points",
                    va="center", fontsize="small",
                )  # fmt: skip
    if any(below):
        axes.legend(frameon=False, fontsize="small", ncols=len(STEP_PHASES), loc="upper right")


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and up to four before it."""
    windows = [values[max(0, end - _WINDOW) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]
