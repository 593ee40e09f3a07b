from ._described import described as described
from ._names import (
    DRAFT_LOSSES as DRAFT_LOSSES,
    DRAFTS as DRAFTS,
    REWARDS as REWARDS,
    TASKS as TASKS,
    TRACKERS as TRACKERS,
    VERIFIERS as VERIFIERS,
    listed as listed,
)
from ._options import (
    Option as Option,
    Options as Options,
    absolute_place as absolute_place,
    options_of as options_of,
)
from ._words import Among as Among, permitted_values as permitted_values
