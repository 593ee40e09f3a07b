from ._callbacks import AbstractCallback as AbstractCallback, NoCallback as NoCallback, RunView as RunView
from ._device_plan import DevicePlan as DevicePlan, plan_devices as plan_devices
from ._device_tables import device_tables as device_tables
from ._distill import distill as distill
from ._draft_step import features_of as features_of, update_draft as update_draft
from ._evaluate_model import ModelEvaluation as ModelEvaluation, evaluate_model as evaluate_model
from ._generate import generate_text as generate_text
from ._lessons import (
    Lesson as Lesson,
    examine as examine,
    learn_lesson as learn_lesson,
    make_lesson as make_lesson,
    mean_entropy as mean_entropy,
    recall_lesson as recall_lesson,
    with_scheduled_rate as with_scheduled_rate,
)
from ._loop import run as run
from ._out_of_memory import out_of_memory_advice as out_of_memory_advice
from ._planner import UpdatePlanner as UpdatePlanner
from ._result import RunResult as RunResult
from ._roll_out import roll_out as roll_out, roll_out_together as roll_out_together
from ._segments import SegmentLog as SegmentLog
from ._state import RunState as RunState
from ._step import (
    advantages as advantages,
    judge as judge,
    next_examples as next_examples,
    score as score,
    step_key as step_key,
    update_policy as update_policy,
)
