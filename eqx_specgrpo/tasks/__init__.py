from ._arithmetic import (
    Arithmetic as Arithmetic,
    arithmetic_reward as arithmetic_reward,
    running_totals as running_totals,
    running_totals_reward as running_totals_reward,
)
from ._base import (
    AbstractTask as AbstractTask,
    Example as Example,
    collate as collate,
    example_index as example_index,
)
from ._jsonl import JsonlTask as JsonlTask
from ._load import load_rewards as load_rewards, load_task as load_task
from ._numbers import find_numbers as find_numbers, last_number as last_number
from ._reasoning_gym import ReasoningGymTask as ReasoningGymTask
from ._reward_context import RewardLog as RewardLog, TrainerState as TrainerState
from ._rewards import (
    RewardError as RewardError,
    RewardFunction as RewardFunction,
    Rewards as Rewards,
    completion_text as completion_text,
    soft_overlong as soft_overlong,
    think_format_reward as think_format_reward,
)
