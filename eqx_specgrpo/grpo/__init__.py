from ._advantages import (
    frac_reward_zero_std as frac_reward_zero_std,
    group_advantages as group_advantages,
    leave_one_out_advantages as leave_one_out_advantages,
)
from ._batch import (
    UpdateBatch as UpdateBatch,
    make_update_batch as make_update_batch,
    num_prompts as num_prompts,
    padded_width as padded_width,
)
from ._forward import training_features as training_features
from ._kl import kl_k1 as kl_k1, kl_k2 as kl_k2, kl_k3 as kl_k3
from ._logprobs import chunked_logprobs as chunked_logprobs, next_token_positions as next_token_positions
from ._losses import (
    LossNormalizer as LossNormalizer,
    LossType as LossType,
    aggregate_token_losses as aggregate_token_losses,
    policy_loss as policy_loss,
)
from ._memory import (
    UpdateBudget as UpdateBudget,
    UpdateChoice as UpdateChoice,
    choose_update as choose_update,
    update_bytes as update_bytes,
)
from ._metrics import PolicyLossMetrics as PolicyLossMetrics
from ._plan import PlannedMicroBatch as PlannedMicroBatch, plan_micro_batches as plan_micro_batches
from ._step import (
    LossSettings as LossSettings,
    NonFiniteError as NonFiniteError,
    PolicyGradients as PolicyGradients,
    adamw as adamw,
    apply_gradients as apply_gradients,
    check_finite as check_finite,
    compute_copy as compute_copy,
    global_norm as global_norm,
    no_gradients as no_gradients,
    policy_forward as policy_forward,
    policy_gradients as policy_gradients,
    policy_logprobs as policy_logprobs,
)
