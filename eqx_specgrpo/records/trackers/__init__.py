from ._base import (
    AbstractTracker as AbstractTracker,
    Begun as Begun,
    Outcome as Outcome,
    Table as Table,
    TrackedRun as TrackedRun,
    TrackerKind as TrackerKind,
)
from ._kinds import TRACKER_KINDS as TRACKER_KINDS, check_trackers as check_trackers
from ._table import completion_table as completion_table
from ._trackers import Trackers as Trackers, begun_trackers as begun_trackers
