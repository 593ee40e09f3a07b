"""What a key or an option must be, in words."""

import collections.abc
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types


@dataclass(frozen=True)
class Among:
    """In an `Annotated[str, ...]`: the text is one of these."""

    choices: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        del source, handler
        return {"type": "literal", "expected": list(self.choices)}


def permitted_values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values that an annotation admits, in words: "a whole number of at least 1"; empty where there are none."""
    choices = [choice for part in metadata if isinstance(part, Among) for choice in part.choices]
    origin = get_origin(annotation)
    if choices or origin is Literal:
        return "one of " + ", ".join(_quoted(choice) for choice in choices or get_args(annotation))
    if origin in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not types.NoneType]
        words = list(dict.fromkeys(permitted_values(part, metadata) for part in inner))
        unset = ['"none"'] if len(inner) < len(get_args(annotation)) else []
        return " or ".join([*words, *unset]) if all(words) else ""
    if origin in (list, tuple, Sequence, collections.abc.Sequence):
        of, example = _ITEMS.get(get_args(annotation)[0], ("", ""))
        return f"a list of {of}, such as {example}" if of else "a list"
    if origin is dict or annotation is dict:
        return 'a table, such as {old = "new"}' if get_args(annotation)[1:] == (str,) else "a table, such as {name = 8}"
    if origin is Annotated:
        inner, *fields = get_args(annotation)
        return permitted_values(inner, [bound for field in fields for bound in _bounds(field)])
    if annotation is str and metadata:
        return "text that is not empty"
    words = _SINGLE.get(annotation, "") if isinstance(annotation, type) else ""
    bounds = [bound for part in metadata if (bound := _bound(part))]
    return f"{words} {' and '.join(bounds)}" if words and bounds else words


_SINGLE = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text"}
_ITEMS = {str: ("text", '["a", "b"]'), float: ("numbers", "[1.0, 0.5]"), int: ("whole numbers", "[1, 2]")}


def _bounds(field: Any) -> Sequence[Any]:
    """Pydantic's `Field` holds them in a list of its own; others stand as they are."""
    return [field] if isinstance(field, Among | annotated_types.BaseMetadata) else field.metadata


def _quoted(choice: Any) -> str:
    return f'"{choice}"' if isinstance(choice, str) else str(choice)


def _bound(constraint: Any) -> str:
    match constraint:
        case annotated_types.Ge(ge=bound):
            return f"of at least {bound}"
        case annotated_types.Gt(gt=bound):
            return f"greater than {bound}"
        case annotated_types.Le(le=bound):
            return f"at most {bound}"
        case annotated_types.Lt(lt=bound):
            return f"less than {bound}"
        case _:
            return ""
