from .._process import keep_freed_memory as keep_freed_memory
from ._bench_command import bench as bench
from ._bench_plot import plot_bench as plot_bench
from ._bench_result import BenchResult as BenchResult
from ._bench_settings import BenchSettings as BenchSettings, whole_numbers as whole_numbers
from ._checkpoint import (
    latest_checkpoint as latest_checkpoint,
    load_checkpoint as load_checkpoint,
    save_checkpoint as save_checkpoint,
)
from ._config import (
    DraftConfig as DraftConfig,
    GRPOConfig as GRPOConfig,
    ModelConfig as ModelConfig,
    RewardConfig as RewardConfig,
    RunConfig as RunConfig,
    TaskConfig as TaskConfig,
)
from ._distill import distill as distill
from ._generate import generate_text as generate_text
from ._load_config import (
    check_resume as check_resume,
    draft_flags as draft_flags,
    dump_config as dump_config,
    load_config as load_config,
)
from ._loop import run as run
from ._parts import default_model_path as default_model_path, named_draft as named_draft
from ._report import plot_run as plot_run, summary_table as summary_table
from ._run_folder import RunFolder as RunFolder, read_records as read_records
from ._state import RunState as RunState
from ._step import (
    next_examples as next_examples,
    roll_out as roll_out,
    score as score,
    update_draft as update_draft,
    update_policy as update_policy,
)
from ._verify import Certificate as Certificate, Finding as Finding, verify_pair as verify_pair
