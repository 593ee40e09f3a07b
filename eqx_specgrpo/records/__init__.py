from ._checkpoint import (
    checkpointed_steps as checkpointed_steps,
    latest_checkpoint as latest_checkpoint,
    load_checkpoint as load_checkpoint,
    save_checkpoint as save_checkpoint,
)
from ._evaluations import EvaluationRecords as EvaluationRecords
from ._fingerprint import changed_inputs as changed_inputs, fingerprint_file as fingerprint_file
from ._folder import (
    FollowedRunFolder as FollowedRunFolder,
    RunFolder as RunFolder,
    check_unused as check_unused,
    replace_file as replace_file,
    try_folder as try_folder,
)
from ._machine import machine as machine, stolen_seconds as stolen_seconds
from ._plot import new_figure as new_figure, plot_run as plot_run, save_figure as save_figure
from ._progress import RunProgress as RunProgress
from ._record_lines import read_records as read_records, read_steps as read_steps
from ._report import (
    first_to_last as first_to_last,
    phase_times as phase_times,
    rounds_by_length as rounds_by_length,
    run_summary as run_summary,
    summary_table as summary_table,
    summary_text as summary_text,
)
from ._run_folder import AbstractRunFolder as AbstractRunFolder
from ._speculation import (
    Balance as Balance,
    Comparison as Comparison,
    speculation_balance as speculation_balance,
)
from ._times import PhaseTimes as PhaseTimes, step_times as step_times
from .html import flattened as flattened, write_report as write_report
from .trackers import (
    AbstractTracker as AbstractTracker,
    TrackedRun as TrackedRun,
    Trackers as Trackers,
    begun_trackers as begun_trackers,
    check_trackers as check_trackers,
)
