from ._estimates import (
    bootstrap_intervals as bootstrap_intervals,
    majority_value as majority_value,
    pass_at_k as pass_at_k,
)
from ._evaluate import (
    Evaluation as Evaluation,
    EvaluationResult as EvaluationResult,
    evaluate as evaluate,
    make_evaluation as make_evaluation,
)
from ._gathered import (
    Judgement as Judgement,
    gather_rewards as gather_rewards,
    gather_rollouts as gather_rollouts,
    own_prompts as own_prompts,
)
from ._metrics import evaluation_line as evaluation_line
