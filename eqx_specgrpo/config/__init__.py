from ._check import (
    check_draft_options as check_draft_options,
    check_places as check_places,
    default_draft_path as default_draft_path,
    default_model_path as default_model_path,
    load_held_out as load_held_out,
    load_split as load_split,
    load_task_and_rewards as load_task_and_rewards,
    split_task as split_task,
    with_steps_of_epochs as with_steps_of_epochs,
)
from ._dtype_advice import dtype_advice as dtype_advice, largest_of_products as largest_of_products
from ._eval import EvalConfig as EvalConfig, pass_ks as pass_ks
from ._given import (
    NOTHING_GIVEN as NOTHING_GIVEN,
    ConfigLike as ConfigLike,
    Given as Given,
    Policy as Policy,
    RewardLike as RewardLike,
    given_and_named as given_and_named,
    resume_command as resume_command,
)
from ._given_names import is_given as is_given, shown_name as shown_name
from ._load import (
    check_resume as check_resume,
    draft_config as draft_config,
    draft_flags as draft_flags,
    dump_config as dump_config,
    load_config as load_config,
)
from ._lora import LoRAConfig as LoRAConfig, lora_advice as lora_advice
from ._parts import (
    RunParts as RunParts,
    check_prompt as check_prompt,
    draft_spec as draft_spec,
    load_policy as load_policy,
    load_trained_policy as load_trained_policy,
    make_draft as make_draft,
    make_parts as make_parts,
    make_policy_optimizer as make_policy_optimizer,
    model_name as model_name,
    named_draft as named_draft,
    run_mesh as run_mesh,
)
from ._places import with_absolute_paths as with_absolute_paths
from ._sampling import rollout_sampling as rollout_sampling
from ._schedule import learning_rate as learning_rate, rate_advice as rate_advice, rate_schedule as rate_schedule
from ._toml import toml_value as toml_value
from ._tree import (
    DevicesConfig as DevicesConfig,
    DraftConfig as DraftConfig,
    GRPOConfig as GRPOConfig,
    ModelConfig as ModelConfig,
    RewardConfig as RewardConfig,
    RunConfig as RunConfig,
    TaskConfig as TaskConfig,
)
