"""Errors that are the user's to mend. They sit below every station, because every station raises them."""


class UserError(ValueError):
    """Something given to the library is wrong; the message says what, where and what to do.

    The command line prints the message alone, without a traceback, and exits with `exit_code`.
    """

    exit_code = 2


class ConfigError(UserError):
    """A configuration key that does not exist, a value out of range, or values that contradict one another."""


class CheckpointError(UserError):
    """A file of weights or of run state that is missing, truncated, corrupt, or made for something else."""
