from ._arithmetic import Arithmetic as Arithmetic
from ._arithmetic_reward import arithmetic_reward as arithmetic_reward
from ._base import (
    AbstractTask as AbstractTask,
    Example as Example,
    collate as collate,
    example_index as example_index,
)
from ._given import given_options as given_options, given_task as given_task
from ._holdout import (
    TaskSplit as TaskSplit,
    first_items as first_items,
    hold_out as hold_out,
    keep_apart as keep_apart,
)
from ._kind import RewardKind as RewardKind, TaskKind as TaskKind
from ._load import (
    REWARD_KINDS as REWARD_KINDS,
    TASK_KINDS as TASK_KINDS,
    absolute_task as absolute_task,
    absolute_task_options as absolute_task_options,
    load_rewards as load_rewards,
    load_task as load_task,
    task_options as task_options,
)
from ._math_reward import math_reward as math_reward
from ._mixture import MixtureTask as MixtureTask
from ._numbers import find_numbers as find_numbers, last_number as last_number
from ._order import (
    ORDERS as ORDERS,
    AbstractOrder as AbstractOrder,
    EasiestFirst as EasiestFirst,
    Shuffled as Shuffled,
    indices_from as indices_from,
)
from ._reasoning_gym import ReasoningGymTask as ReasoningGymTask
from ._reward_call import RewardError as RewardError, RewardFunction as RewardFunction
from ._reward_context import RewardLog as RewardLog, TrainerState as TrainerState
from ._rewards import Rewards as Rewards, completion_text as completion_text
from ._running_totals import running_totals as running_totals, running_totals_reward as running_totals_reward
from ._soft_overlong import soft_overlong as soft_overlong
from ._table import Rows as Rows, TableTask as TableTask
from ._think_format import think_format_reward as think_format_reward
from ._time_limit import OutOfTime as OutOfTime, limited as limited
