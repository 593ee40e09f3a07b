from ._base import AbstractDraftLoss as AbstractDraftLoss
from ._cross_entropy_tv import CrossEntropyTV as CrossEntropyTV
from ._draft_loss_kind import DraftLossKind as DraftLossKind
from ._draft_losses import DRAFT_LOSS_KINDS as DRAFT_LOSS_KINDS, make_draft_loss as make_draft_loss
from ._end_to_end_tv import EndToEndTV as EndToEndTV
from ._forward_kl import ForwardKL as ForwardKL
from ._lk_hybrid import LKHybrid as LKHybrid
from ._losses import (
    expected_acceptance as expected_acceptance,
    forward_kl as forward_kl,
    lk_hybrid as lk_hybrid,
    log_acceptance as log_acceptance,
    reverse_kl as reverse_kl,
    sayable as sayable,
    total_variation as total_variation,
)
from ._reverse_kl import ReverseKL as ReverseKL
from ._step import (
    DraftBatch as DraftBatch,
    DraftGradients as DraftGradients,
    draft_gradients as draft_gradients,
    select_rows as select_rows,
)
from ._temperature import TemperatureFit as TemperatureFit, fit_temperature as fit_temperature
from ._total_variation import TotalVariation as TotalVariation
