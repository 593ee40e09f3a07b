from ._average import (
    constant_mean as constant_mean,
    micro_batch_mean as micro_batch_mean,
    sequence_mean as sequence_mean,
    sequence_sum as sequence_sum,
    token_mean as token_mean,
)
from ._base import (
    MAX_LOG_RATIO as MAX_LOG_RATIO,
    AbstractPolicyLoss as AbstractPolicyLoss,
    CorrectionMode as CorrectionMode,
    Level as Level,
    LossTraits as LossTraits,
    TokenInputs as TokenInputs,
    TokenLosses as TokenLosses,
    ratio_of as ratio_of,
)
from ._bnpo import BNPO as BNPO
from ._cispo import CISPO as CISPO
from ._clipped import AbstractClipped as AbstractClipped
from ._dapo import DAPO as DAPO
from ._dppo import AbstractDPPO as AbstractDPPO
from ._dppo_kl import DPPOKL as DPPOKL, binary_kl as binary_kl
from ._dppo_tv import DPPOTV as DPPOTV
from ._dr_grpo import DrGRPO as DrGRPO
from ._grpo import GRPO as GRPO
from ._luspo import LUSPO as LUSPO
from ._names import POLICY_LOSSES as POLICY_LOSSES, make_policy_loss as make_policy_loss
from ._normalizer import LossNormalizer as LossNormalizer
from ._option import LossOption as LossOption, option as option, options_of as options_of
from ._sapo import SAPO as SAPO
from ._vespo import VESPO as VESPO, gamma_weight as gamma_weight
