from ._command import (
    Contender as Contender,
    bench as bench,
    draft_run_config as draft_run_config,
    generate_for as generate_for,
    make_contender as make_contender,
    measure_drafts as measure_drafts,
    prepare as prepare,
)
from ._measure import (
    ADAPTIVE as ADAPTIVE,
    PLAIN as PLAIN,
    Arm as Arm,
    ArmRun as ArmRun,
    Workload as Workload,
    measure as measure,
    plain_arm as plain_arm,
    rotating as rotating,
)
from ._plot import check_plot as check_plot, plot_bench as plot_bench
from ._result import (
    BenchResult as BenchResult,
    expected_length as expected_length,
    summarize as summarize,
)
from ._settings import BenchSettings as BenchSettings, whole_numbers as whole_numbers
