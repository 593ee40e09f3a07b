"""Paths as users write them."""

from pathlib import Path

from ..errors import UserError


def user_path(text: str | Path) -> Path:
    """A path in which `~` and `~name` at the beginning stand for a home folder.

    **Raises:**

    `UserError` if there is no such home (of an unknown user, or of one without an entry where `HOME` is not set), or
    the system takes no such path: it is too long, or leads through a folder that may not be entered.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError:
        raise UserError(f"{text}: it isn't known where this home folder is: write the path out, or set HOME") from None
    except OSError as error:
        shown = str(text) if len(str(text)) <= 200 else f"{str(text)[:200]}..."
        raise UserError(f"the path {shown} can't be used: {error.strerror}") from None
    return path
