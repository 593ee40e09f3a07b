from ._losses import (
    expected_acceptance as expected_acceptance,
    forward_kl as forward_kl,
    lk_hybrid as lk_hybrid,
    log_acceptance as log_acceptance,
    reverse_kl as reverse_kl,
    sayable as sayable,
    total_variation as total_variation,
)
from ._objectives import (
    AbstractDraftLoss as AbstractDraftLoss,
    EndToEndTV as EndToEndTV,
    ForwardKL as ForwardKL,
    LKHybrid as LKHybrid,
    ReverseKL as ReverseKL,
    TotalVariation as TotalVariation,
)
from ._step import (
    DraftBatch as DraftBatch,
    DraftGradients as DraftGradients,
    draft_gradients as draft_gradients,
    select_rows as select_rows,
)
from ._temperature import TemperatureFit as TemperatureFit, fit_temperature as fit_temperature
