"""How a command ends, whatever is called in it."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Stopped, UserError

_OF_CTRL_C = 130


@contextmanager
def ending_on_our_terms(stopped_at_once: str) -> Iterator[None]:
    """Around what a command calls, code of the user's among it.

    A stop at once is told, and has the exit code of its signal. `sys.exit()`, which a draft's class may call, is an
    error: it would end the program with a code of its own, 0 for instance, as if all had gone well.

    **Arguments:**

    - `stopped_at_once`: what to say where a signal did not wait: what there is, and how to go on.

    **Raises:**

    `UserError` where something called `sys.exit()`, with the place.
    """
    try:
        yield
    except Stopped as stop:
        if stop.at_once:
            print(stopped_at_once, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(stopped_at_once, file=sys.stderr)
        sys.exit(_OF_CTRL_C)
    except SystemExit as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{frame.filename}, line {frame.lineno}: sys.exit({error.code!r}) was called there; raise an exception "
            "that says what is wrong instead"
        ) from error
