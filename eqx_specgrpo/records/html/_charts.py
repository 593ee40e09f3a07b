"""Which metrics the report shows as curves, in which order, together with what, and in which units.

What is not named here gets a curve of its own at the end.
"""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .._times import STEP_PHASES


@dataclass(frozen=True)
class Chart:
    """A chart.

    **Arguments:**

    - `title`: what is shown; `{}` stands for what a `*` of the metric's name stood for, and makes a chart for each.
    - `unit`: of the vertical axis.
    - `metrics`: names of metrics, in which `*` stands for anything.
    - `kind`: `lines`; `band`, a line between the two that follow; `stack`, areas on one another; or `interval`, a band
        between `.../low` and `.../high` of the metric where there are these two, else a line.
    - `from_zero`: the axis begins at 0.
    - `reference`: a horizontal line, and what it is.
    - `at_least`: without so many lines it says what another chart says.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]
    kind: str = "lines"
    from_zero: bool = False
    reference: tuple[float, str] | None = None
    at_least: int = 1


@dataclass(frozen=True)
class Section:
    """Charts under a heading."""

    title: str
    charts: tuple[Chart, ...]


_SHARE = "share"
SECTIONS = (
    Section(
        "Reward",
        (
            Chart("Reward", "mean of a step", ("reward",)),
            Chart("Reward by function", "mean of a step", ("rewards/*/mean",), at_least=2),
            Chart("Spread within a group", "standard deviation", ("reward_std",), from_zero=True),
            Chart("Groups whose rewards are all equal", _SHARE, ("frac_reward_zero_std",), from_zero=True),
        ),
    ),
    Section("Evaluation", (Chart("{}", "", ("eval/*",), kind="interval"),)),
    Section(
        "Policy",
        (
            Chart("Entropy", "nats a token", ("entropy",), from_zero=True),
            Chart("KL from the reference", "nats a token", ("kl",)),
            Chart("Loss", "", ("loss",)),
            Chart("Gradient norm, before clipping", "", ("grad_norm",), from_zero=True),
            Chart("Learning rate", "", ("learning_rate",), from_zero=True),
            Chart("Tokens that were clipped", _SHARE, ("clip_ratio/low_mean", "clip_ratio/high_mean"), from_zero=True),
            Chart("Gap between decoder and trainer, mean", "difference of log-probabilities",
                  ("sampling/sampling_logp_difference/mean",), from_zero=True),
            Chart("Gap between decoder and trainer, largest", "difference of log-probabilities",
                  ("sampling/sampling_logp_difference/max",), from_zero=True),
        ),
    ),
    Section(
        "Completions",
        (
            Chart(
                "Length: mean, between shortest and longest",
                "tokens",
                ("completions/mean_length", "completions/min_length", "completions/max_length"),
                kind="band",
                from_zero=True,
            ),
            Chart("Did not end by themselves", _SHARE, ("completions/clipped_ratio",), from_zero=True),
        ),
    ),
    Section(
        "Speculation",
        (
            Chart(
                "Acceptance length", "tokens per target pass", ("spec/acceptance_length",),
                reference=(1.0, "plain decoding"),
            ),
            Chart("Acceptance by draft position", _SHARE, ("spec/acceptance_rate_pos_*",), from_zero=True),
            Chart("Draft length", "tokens drafted per target pass", ("spec/draft_length",), from_zero=True),
            Chart("Rounds by draft length", "rounds", ("spec/rounds_length_*",), kind="stack", from_zero=True,
                  at_least=2),
            Chart("Decoding", "tokens a second", ("spec/tokens_per_second",), from_zero=True),
            Chart("Saved by speculation, and spent on lessons", "seconds a step",
                  ("draft/seconds_saved", "draft/seconds_spent")),
            Chart("Loss of the draft", "", ("draft/loss",)),
            Chart("Expected acceptance, on what it learns from", _SHARE, ("draft/expected_acceptance_pos_*",),
                  from_zero=True),
        ),
    ),
    Section(
        "Time",
        (
            Chart("Time by phase", "seconds a step", tuple(f"time/{phase}" for phase in STEP_PHASES), kind="stack",
                  from_zero=True),
            Chart("Tokens of a step", "tokens", ("num_tokens",), from_zero=True),
        ),
    ),
)  # fmt: skip
# Shown in other ways, or no curves.
_LEFT_OUT = ("step", "time/step", "clip_ratio/region_mean")
_OTHERS = "Other metrics"


def charts_of(names: Iterable[str]) -> list[dict[str, Any]]:
    """The sections that there are metrics for, as the page takes them.

    **Arguments:**

    - `names`: of all metrics that some run has.
    """
    left = [name for name in dict.fromkeys(names) if name not in _LEFT_OUT]
    sections = []
    for section in (*SECTIONS, Section(_OTHERS, (Chart("{}", "", ("*",)),))):
        charts = []
        for chart in section.charts:
            found = {name: label for pattern in chart.metrics for name, label in _matching(pattern, left).items()}
            # What a kind draws between several needs all of them.
            if len(found) < (len(chart.metrics) if chart.kind == "band" else chart.at_least):
                continue
            left = [name for name in left if name not in found]
            charts += [_as_json(chart, group) for group in _groups(chart, found)]
        if charts:
            sections.append({"title": section.title, "charts": charts})
    return sections


def _matching(pattern: str, names: Iterable[str]) -> dict[str, str]:
    """The names that match, each with what tells it from the others of its chart."""
    before, star, after = pattern.partition("*")
    found = {name: name for name in names if fnmatch.fnmatchcase(name, pattern)}
    if star:
        found = {name: name[len(before) : len(name) - len(after)] for name in found}
        return dict(sorted(found.items(), key=lambda item: _naturally(item[1])))
    return {name: re.sub(r"_mean$", "", name.rpartition("/")[2]) for name in found}


def _groups(chart: Chart, found: dict[str, str]) -> list[dict[str, str]]:
    """What goes into one chart each."""
    if chart.kind == "interval":
        ends = {name: (f"{name}/low", f"{name}/high") for name in found}
        within = {name for both in ends.values() if set(both) <= found.keys() for name in both}
        groups = [[name, *(end for end in ends[name] if end in within)] for name in found if name not in within]
        return [{name: found[name] for name in group} for group in groups]
    return [{name: label} for name, label in found.items()] if "{}" in chart.title else [found]


def _naturally(text: str) -> list[tuple[int, int | str]]:
    """An order in which 10 comes after 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]


def _as_json(chart: Chart, group: dict[str, str]) -> dict[str, Any]:
    (first, *_) = group.values()
    kind = chart.kind
    if kind == "interval":
        kind = "band" if len(group) == 3 else "lines"
    return {
        "title": chart.title.replace("{}", first),
        "unit": chart.unit,
        "kind": kind,
        "fromZero": chart.from_zero,
        "reference": chart.reference,
        "series": [{"key": name, "label": label} for name, label in group.items()],
    }
