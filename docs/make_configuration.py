"""Writes the tables of docs/configuration.md, so that they cannot be out of date: the keys, and what can be chosen.

    python docs/make_configuration.py

A test compares the page with what this script would write.
"""

import inspect
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import eqx_specgrpo
from eqx_specgrpo.choices import Option, permitted_values
from eqx_specgrpo.config import RunConfig, toml_value
from eqx_specgrpo.drafts import DRAFT_KINDS, draft_options
from eqx_specgrpo.tasks import REWARD_KINDS, TASK_KINDS, task_options

PAGE = Path(__file__).parent / "configuration.md"
PRESET = Path(inspect.getfile(eqx_specgrpo)).parent / "assets" / "default.toml"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"


def tables() -> str:
    """One table for the top level and one for each section."""
    preset = tomllib.loads(PRESET.read_text(encoding="utf-8"))
    top = [(name, field) for name, field in RunConfig.model_fields.items() if not _is_section(field)]
    text = ["### Top level\n", *_table("", top, preset)]
    for section, field in RunConfig.model_fields.items():
        if _is_section(field):
            model: Any = field.annotation
            text += ["", f"### `[{section}]`\n", f"{inspect.getdoc(model)}\n"]
            text += _table(f"{section}.", list(model.model_fields.items()), preset.get(section, {}))
            text += _OPTIONS.get(section, list)()
    return "\n".join(text) + "\n"


def _of_tasks() -> list[str]:
    rows = [(form, option) for form in TASK_KINDS for option in task_options(form).known]
    return ["", "Options of the tasks:\n", *_option_table("task", "task.", rows)]


def _of_rewards() -> list[str]:
    rows = [f"| `{form}` | {kind.summary} |" for form, kind in REWARD_KINDS.items()]
    return ["", "Built-in functions:\n", "| `reward.functions` | is |", "| --- | --- |", *rows]


def _of_drafts() -> list[str]:
    rows = [(kind, option) for kind in DRAFT_KINDS for option in draft_options(kind).known]
    return [
        "",
        "### `[draft.options]`\n",
        "Options of the drafts:\n",
        *_option_table("draft.kind", "draft.options.", rows),
    ]


_OPTIONS = {"task": _of_tasks, "reward": _of_rewards, "draft": _of_drafts}


def _option_table(of: str, prefix: str, rows: list[tuple[str, Option]]) -> Iterator[str]:
    yield f"| `{of}` | key | it must be | default | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for name, option in rows:
        permitted = permitted_values(option.annotation)
        if option.is_required:
            default = "has to be given"
        else:
            default = "none" if option.default is None else f"`{toml_value(option.default)}`"
        yield f"| `{name}` | `{prefix}{option.name}` | {permitted} | {default} | {option.description} |"


def page(old: str) -> str:
    """The page with its tables made anew."""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has lost its marks {BEGIN.strip()} and {END.strip()}: put them back")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _table(prefix: str, fields: list[tuple[str, FieldInfo]], preset: dict[str, Any]) -> Iterator[str]:
    yield "| key | it must be | default | in the default run | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for name, field in fields:
        default = "none" if field.default is None else f"`{toml_value(field.default)}`"
        in_preset = f"`{toml_value(preset[name])}`" if name in preset and preset[name] != field.default else ""
        permitted = permitted_values(field.annotation, field.metadata)
        yield f"| `{prefix}{name}` | {permitted} | {default} | {in_preset} | {field.description} |".replace("  ", " ")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
