"""Writes the tables of docs/configuration.md from `RunConfig`, so that they cannot be out of date.

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
from eqx_specgrpo.config import RunConfig, permitted_values, toml_value

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
    return "\n".join(text) + "\n"


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
