"""Writing TOML: the standard library only reads it."""

import datetime
import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def toml_value(value: Any) -> str:
    """`value` as TOML text on one line, such that `tomllib` reads the same value back.

    **Raises:**

    `ConfigError` for a value TOML cannot hold, `None` among them.
    """
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # JSON's escapes are TOML's, but for DEL.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case datetime.date() | datetime.time():
            return value.isoformat()
        case list() | tuple():
            return "[" + ", ".join(toml_value(item) for item in value) + "]"
        case Mapping():
            return "{" + ", ".join(f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
        case _:
            raise ConfigError(
                f"{value!r} cannot be written as TOML: use text, numbers, true or false, lists and tables"
            )


def toml_key(key: str) -> str:
    """`key`, quoted where it has to be."""
    return key if _BARE_KEY.fullmatch(key) else toml_value(key)


def parse_toml_value(text: str, *, is_text: bool = False) -> Any:
    """The value of a `--set key=text`: TOML where it is TOML, else the text itself, so that quotes may be left out.

    **Arguments:**

    - `text`: what follows the equals sign.
    - `is_text`: the key holds text, so that `12` and `2024-01-01` are text as well; only quotes are taken off.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also a number of thousands of digits, and deep nesting
        return text
    value = parsed["value"]
    if len(parsed) > 1 or (is_text and not isinstance(value, str)):
        return text
    return value
