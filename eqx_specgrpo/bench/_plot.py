"""A benchmark, or several, as a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..records import new_figure, save_figure, try_folder
from ._measure import ADAPTIVE, PLAIN

_COLORS = ("#1b6ca8", "#c8553d", "#5a8f5a", "#e0a030", "#7a5195", "#3aa6a6", "#8c564b", "#444444")
_LINES = ("-", "--", ":", "-.")


def check_plot(path: Path) -> None:
    """To be done before the work that is to be drawn.

    **Raises:**

    `UserError` without matplotlib (extra `plot`), or if the picture can't be written: no such format, or no such place.
    """
    formats = new_figure(1.0, 1.0).canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise UserError(f"{path}: there is no picture format {path.suffix}; name a file such as bench.png")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file, such as {path / 'bench.png'}")
    if not path.parent.is_dir():
        raise UserError(f"{path} could not be written: there is no folder {path.parent}")
    try_folder(path.parent)


def plot_bench(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Draws the ratio to plain decoding and the acceptance length over the draft length, a column for each number of
    rows, a colour for each draft, a line style for each verifier.

    **Arguments:**

    - `results`: as `summarize` returns; where several have the same arm (seeds), their mean is drawn, with a bar from
        the least to the greatest.
    - `path`: of the picture.

    **Raises:**

    `UserError` without matplotlib (extra `plot`), or if the picture can't be written.
    """
    speculative = [row for row in results if row["draft"] != PLAIN]
    columns = sorted({row["rows"] for row in speculative})
    lengths = sorted({row["length"] for row in speculative}, key=lambda length: (isinstance(length, str), length))
    drafts = list(dict.fromkeys(row["draft"] for row in speculative))
    verifiers = list(dict.fromkeys(row["verifier"] for row in speculative))
    figure = new_figure(1.5 + 4.2 * max(len(columns), 1), 7.0)
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(2, max(len(columns), 1), sharex=True, sharey="row", squeeze=False)
    for column, rows in enumerate(columns):
        for draft in drafts:
            for verifier in verifiers:
                arm = [r for r in speculative if (r["rows"], r["draft"], r["verifier"]) == (rows, draft, verifier)]
                label = draft if len(verifiers) == 1 else f"{draft}, {verifier}"
                style = {
                    "color": _COLORS[drafts.index(draft) % len(_COLORS)],
                    "linestyle": _LINES[verifiers.index(verifier) % len(_LINES)],
                }
                for panel, value in zip(panels[:, column], (_ratio, _acceptance_length), strict=True):
                    _draw(panel, arm, lengths, value, label, style)
        panels[0][column].set_title(f"{rows} rows", loc="left")
        panels[1][column].set_xlabel("tokens drafted a round")
        panels[1][column].set_xticks(range(len(lengths)), [str(length) for length in lengths])
        for panel in panels[:, column]:
            panel.axhline(1.0, color="0.4", linestyle="--", linewidth=1)
            panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("tokens/s over plain decoding's")
    panels[1][0].set_ylabel("acceptance length, tokens a target pass")
    if speculative:
        panels[1][0].legend(frameon=False, fontsize="small")
    return save_figure(figure, path)


def _ratio(row: Mapping[str, Any]) -> float:
    return row["ratio"]["median"]


def _acceptance_length(row: Mapping[str, Any]) -> float:
    return row["acceptance_length"]


def _draw(panel: Any, arm: Sequence[Mapping[str, Any]], lengths: list, value: Any, label: str, style: dict) -> None:
    """The numbers of lengths as a line; what a controller chose as a point of its own."""
    at = {length: [value(row) for row in arm if row["length"] == length] for length in lengths}
    for group, is_point in (([k for k in lengths if isinstance(k, int)], False), ([ADAPTIVE], True)):
        group = [length for length in group if at.get(length)]
        if not group:
            continue
        means = [statistics.mean(at[length]) for length in group]
        bars = [
            [mean - min(at[length]) for mean, length in zip(means, group, strict=True)],
            [max(at[length]) - mean for mean, length in zip(means, group, strict=True)],
        ]
        shown = {**style, "linestyle": "none"} if is_point else style
        panel.errorbar(
            [lengths.index(length) for length in group],
            means,
            yerr=bars,
            marker="D" if is_point else "o",
            markersize=4,
            capsize=2,
            label=None if is_point and any(isinstance(k, int) and at[k] for k in lengths) else label,
            **shown,
        )
