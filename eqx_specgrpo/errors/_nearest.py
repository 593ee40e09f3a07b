"""The part of an error message that helps with a misspelt name."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, choices: Iterable[str], limit: int = 20) -> str:
    """The nearest names, or else the choices; starts with a space, ends with a stop or question mark."""
    choices = sorted(choices)
    nearest = difflib.get_close_matches(name, choices, n=3)
    if nearest:
        return f" Did you mean {' or '.join(repr(choice) for choice in nearest)}?"
    if not choices:
        return ""
    listed = ", ".join(choices[:limit]) + (", ..." if len(choices) > limit else "")
    return f" The choices are: {listed}."
