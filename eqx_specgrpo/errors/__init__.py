from ._errors import (
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    Stopped as Stopped,
    UserError as UserError,
)
from ._nearest import did_you_mean as did_you_mean
