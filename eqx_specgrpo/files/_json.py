"""Writing JSON that any reader takes."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np


def json_line(value: Any, *, ascii_only: bool = False) -> str:
    """`value` as JSON on one line. JSON has no NaN and no infinity: both become `null`.

    **Arguments:**

    - `value`: of mappings, lists, text, numbers, and arrays and scalars of numpy and JAX.
    - `ascii_only`: write other characters as escapes.

    **Raises:**

    `TypeError` for what JSON cannot hold.
    """
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=ascii_only)


def print_json(value: Any) -> None:
    """Prints `json_line(value)`, in what the encoding of standard output can hold."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    print(json_line(value, ascii_only=encoding != "utf8"))


def _plain(value: Any) -> Any:
    match value:
        case None | str() | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            array = np.asarray(value)
            if array.dtype == object:
                raise TypeError(f"{value!r} cannot be written as JSON")
            return _plain(array.tolist())
