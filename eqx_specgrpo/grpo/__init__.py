from ._advantages import (
    ADVANTAGE_ESTIMATORS as ADVANTAGE_ESTIMATORS,
    AdvantageEstimator as AdvantageEstimator,
    ScaleRewards as ScaleRewards,
    frac_reward_zero_std as frac_reward_zero_std,
    group_advantages as group_advantages,
    leave_one_out_advantages as leave_one_out_advantages,
    max_rl_advantages as max_rl_advantages,
    normalize_then_sum_advantages as normalize_then_sum_advantages,
    pass_at_k as pass_at_k,
    pass_at_k_advantages as pass_at_k_advantages,
)
from ._batch import (
    UpdateBatch as UpdateBatch,
    make_update_batch as make_update_batch,
    num_prompts as num_prompts,
    padded_width as padded_width,
)
from ._correction import correction_metrics as correction_metrics, importance_weights as importance_weights
from ._division import (
    RowFeatures as RowFeatures,
    batch_of_shards as batch_of_shards,
    divide_rows as divide_rows,
    rows_of_shards as rows_of_shards,
)
from ._entropy import (
    AbstractEntropyControl as AbstractEntropyControl,
    AdaptiveEntropyCoef as AdaptiveEntropyCoef,
    EntropyState as EntropyState,
    FixedEntropyCoef as FixedEntropyCoef,
    high_entropy_mask as high_entropy_mask,
)
from ._forward import training_features as training_features
from ._kl import (
    KL_ESTIMATORS as KL_ESTIMATORS,
    KLEstimator as KLEstimator,
    kl_k1 as kl_k1,
    kl_k2 as kl_k2,
    kl_k3 as kl_k3,
)
from ._logprobs import chunked_logprobs as chunked_logprobs, next_token_positions as next_token_positions
from ._memory import (
    UpdateBudget as UpdateBudget,
    UpdateChoice as UpdateChoice,
    choose_update as choose_update,
    update_bytes as update_bytes,
)
from ._metrics import PolicyLossMetrics as PolicyLossMetrics
from ._optimizers import (
    OPTIMIZERS as OPTIMIZERS,
    OptimizerName as OptimizerName,
    adamw as adamw,
    make_optimizer as make_optimizer,
    optimizer_bytes as optimizer_bytes,
)
from ._plan import PlannedMicroBatch as PlannedMicroBatch, plan_micro_batches as plan_micro_batches
from ._policy_loss import policy_loss as policy_loss
from ._step import (
    LossSettings as LossSettings,
    NonFiniteError as NonFiniteError,
    PolicyGradients as PolicyGradients,
    apply_gradients as apply_gradients,
    check_finite as check_finite,
    compute_copy as compute_copy,
    global_norm as global_norm,
    no_gradients as no_gradients,
    policy_entropies as policy_entropies,
    policy_forward as policy_forward,
    policy_gradients as policy_gradients,
    policy_logprobs as policy_logprobs,
    trained_part as trained_part,
    with_trained_part as with_trained_part,
)
from ._support_metrics import support_metrics as support_metrics
from .losses import (
    POLICY_LOSSES as POLICY_LOSSES,
    AbstractPolicyLoss as AbstractPolicyLoss,
    CorrectionMode as CorrectionMode,
    Level as Level,
    LossNormalizer as LossNormalizer,
    make_policy_loss as make_policy_loss,
)
