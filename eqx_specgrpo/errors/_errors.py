"""Errors that are the user's to mend, and the end that a signal asks for. They sit below every station, because every
station raises them."""

import signal


class UserError(ValueError):
    """Something given to the library is wrong; the message says what, where and what to do.

    The command line prints the message alone, without a traceback, and exits with `exit_code`.
    """

    exit_code = 2


class ConfigError(UserError):
    """A configuration key that does not exist, a value out of range, or values that contradict one another."""


class CheckpointError(UserError):
    """A file of weights or of run state that is missing, truncated, corrupt, or made for something else."""


class Stopped(SystemExit):
    """A signal has asked for an end, and got it.

    A `SystemExit`, so that a script ends as well, without a traceback and with the exit code that shells give to a
    signal's end: 130 of Ctrl-C, 143 of SIGTERM, 129 of SIGHUP.

    **Arguments:**

    - `number`: of the signal.
    - `at_once`: whether what was being done was left as it was; else it was finished or saved first, and that was said.
    """

    number: signal.Signals
    at_once: bool

    def __init__(self, number: signal.Signals, *, at_once: bool):
        super().__init__(128 + number)
        self.number = number
        self.at_once = at_once
