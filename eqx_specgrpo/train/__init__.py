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
from ._generate import generate_text as generate_text
from ._load_config import check_resume as check_resume, dump_config as dump_config, load_config as load_config
from ._loop import run as run
from ._parts import default_model_path as default_model_path
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
