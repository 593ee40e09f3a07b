"""Paths as users write them."""

from pathlib import Path

from ..errors import UserError


def user_path(text: str | Path) -> Path:
    """A path in which `~` and `~name` at the beginning stand for a home folder.

    **Raises:**

    `UserError` if there is no such home: of an unknown user, or of one without an entry where `HOME` is not set.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: it isn't known where this home folder is: write the path out, or set HOME") from None
