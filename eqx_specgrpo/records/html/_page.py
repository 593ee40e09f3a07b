"""The report of runs as one page of HTML that needs nothing else: no network, no other file."""

import base64
import datetime
import hashlib
import html
import json
import math
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import json_line
from .._folder import replace_file
from .._report import first_to_last, phase_times
from .._speculation import speculation_balance
from .._times import seconds_by_phase
from ._charts import charts_of
from ._choose import choose_completions
from ._read import RunStory, read_run

_STYLES = ("report.css",)
_SCRIPTS = ("dom.js", "scales.js", "charts.js", "completions.js", "tables.js", "report.js")
_CHARACTERS = 6_000_000  # of completions in one page, over all runs
_DIGITS = 6
# What a completion's record holds besides the rewards by function and what rewards have logged.
_COLUMNS = frozenset({"step", "prompt", "completion", "length", "stop_reason", "reward", "advantage"})


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of one run, or of several side by side, also while they go on.

    **Arguments:**

    - `folders`: of the runs.
    - `out`: the file to write; without it `report.html`, of one run in its folder, of several in the working directory.

    **Returns:**

    The path of the page.

    **Raises:**

    `UserError` if a folder holds no run with a step, or the page can't be written; an earlier page is as it was then.
    """
    stories = [read_run(folder) for folder in folders]
    if out is None:
        out = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    elif out.is_dir():
        raise UserError(f"{out} is a folder: name the file to write, such as --out {out / 'report.html'}")
    content = page(_data(stories))
    replace_file(out, content.encode("utf-8", "replace"), "the page that was there, if any, is as it was")
    return out


def page(data: dict[str, Any]) -> str:
    """The page that shows the data.

    Its only script and style are those of the package: the policy in its head has their digests, so that a browser
    runs nothing else and loads nothing, whatever the data holds.
    """
    style, script = (_asset(*names) for names in (_STYLES, _SCRIPTS))
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'"
    filled = {
        "POLICY": policy,
        "TITLE": html.escape(", ".join(run["name"] for run in data["runs"])),
        "STYLE": style,
        "DATA": _in_script(json_line(data)),
        "SCRIPT": script,
    }
    text = _asset("page.html")
    pieces = [piece.partition("}}") for piece in text.split("{{")]
    # Each mark once, in one pass: nothing that is filled in is read as a mark.
    return pieces[0][0] + "".join(filled[mark] + after for mark, _, after in pieces[1:])


def _asset(*names: str) -> str:
    folder = resources.files("eqx_specgrpo") / "assets" / "report"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _in_script(text: str) -> str:
    """JSON that can stand between the tags of a script: no `<`, so nothing ends or opens one."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _data(stories: Sequence[RunStory]) -> dict[str, Any]:
    """All that the page shows, as JSON can hold it."""
    names = _distinct([story.folder for story in stories])
    keys = dict.fromkeys(key for story in stories for key in _metric_names(story))
    return {
        "made": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "sections": charts_of(keys),
        "runs": [
            _run(story, name, _CHARACTERS // len(stories)) for story, name in zip(stories, names, strict=True)
        ],
    }  # fmt: skip


def _run(story: RunStory, name: str, characters: int) -> dict[str, Any]:
    done = max(record["step"] for record in story.metrics)
    total = story.config.get("steps")
    return {
        "name": name,
        "folder": str(story.folder),
        "done": done,
        "steps": total if isinstance(total, int) else None,
        "unreadable": story.unreadable,
        "metrics": _columns(story),
        "config": story.config,
        "machines": story.machines,
        "ends": {
            key: first_to_last(story.metrics, key) for key in ("reward", "completions/mean_length", "entropy")
        } | {"spec/acceptance_length": first_to_last(story.metrics, "spec/acceptance_length")},
        "phases": _phases(story),
        "speculation": _speculation(story),
        "completions": _completions(story, characters),
    }  # fmt: skip


def _metric_names(story: RunStory) -> dict[str, None]:
    """Those with a number in some step, in the order in which they came."""
    return {key: None for record in story.metrics for key, value in record.items() if _is_number(value)}


def _columns(story: RunStory) -> dict[str, Any]:
    """Each metric as its steps and values, where it has one; what was not finite is no value."""
    columns: dict[str, Any] = {}
    for key in _metric_names(story):
        points = [(record["step"], record[key]) for record in story.metrics if _is_number(record.get(key))]
        columns[key] = {"x": [step for step, _ in points], "y": [_rounded(value) for _, value in points]}
    return columns


def _phases(story: RunStory) -> dict[str, Any]:
    """Where the time went: of all that the run took where every start is known, else of its steps."""
    if story.times and story.times[0]["from_step"] == 1:
        try:
            phases = seconds_by_phase(story.times)
            return {"whole": True, "rows": [[phase, *map(_rounded, both)] for phase, both in phases.items()]}
        except (KeyError, TypeError, AttributeError):
            pass  # a line of times.jsonl that is not one of ours
    return {
        "whole": False,
        "rows": [[phase, _rounded(seconds), None] for phase, seconds in phase_times(story.metrics).items()],
    }


def _speculation(story: RunStory) -> dict[str, Any]:
    """What speculation gave: against plain decoding at the end, and in seconds over the run."""
    steps = [record for record in story.metrics if "time/rollout" in record]
    try:
        balance = speculation_balance(steps, story.times, story.comparison)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        balance = None
    comparison = story.comparison
    return {
        "comparison": None
        if comparison is None
        else {
            "steps": comparison.steps,
            "speculative": _rounded(comparison.speculative),
            "plain": _rounded(comparison.plain),
            "ratio": _rounded(comparison.ratio) if comparison.plain else None,
        },
        "balance": None
        if balance is None
        else {
            "basis": balance.basis,
            "rollouts": _rounded(balance.rollouts),
            "draft": _rounded(balance.draft),
            "compiling": _rounded(balance.compiling),
            "total": _rounded(balance.total),
        },
    }


def _completions(story: RunStory, characters: int) -> dict[str, Any]:
    """The chosen completions. A prompt, which several share, is there once."""
    chosen = choose_completions(story.completions, characters)
    prompts: dict[str, int] = {}
    rows = []
    for record in chosen:
        prompt = json_line(record.get("prompt"))
        rows.append(
            {
                "step": record["step"],
                "prompt": prompts.setdefault(prompt, len(prompts)),
                "text": str(record.get("completion", "")),
                "length": record.get("length"),
                "stop": record.get("stop_reason"),
                "reward": _rounded(record.get("reward")),
                "advantage": _rounded(record.get("advantage")),
                "more": {key: _rounded(value) for key, value in record.items() if key not in _COLUMNS},
            }
        )
    return {"of": len(story.completions), "prompts": [_messages(text) for text in prompts], "rows": rows}


def _messages(prompt: str) -> list[list[str]]:
    """A prompt as pairs of role and text; plain text has no role."""
    value = json.loads(prompt)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return [[str(message.get("role", "")), str(message.get("content", ""))] for message in value]
    return [["", value if isinstance(value, str) else prompt]]


def _distinct(folders: Sequence[Path]) -> list[str]:
    """The names of folders; of folders that are called alike, as much of their paths as tells them apart."""
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    above = os.path.commonpath(folders) if len(set(folders)) > 1 else folders[0].parent
    return [folder.relative_to(above).as_posix() for folder in folders]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rounded(value: Any) -> Any:
    """Floats with as many digits as anybody reads."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value
