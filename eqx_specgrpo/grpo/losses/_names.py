"""Every loss by name. A new one is a file in this folder and a line here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...errors import UserError, did_you_mean
from ._base import AbstractPolicyLoss
from ._bnpo import BNPO
from ._cispo import CISPO
from ._dapo import DAPO
from ._dppo_kl import DPPOKL
from ._dppo_tv import DPPOTV
from ._dr_grpo import DrGRPO
from ._grpo import GRPO
from ._luspo import LUSPO
from ._option import options_of
from ._sapo import SAPO
from ._vespo import VESPO

POLICY_LOSSES = MappingProxyType[str, type[AbstractPolicyLoss]](
    {
        "dapo": DAPO,
        "grpo": GRPO,
        "bnpo": BNPO,
        "dr_grpo": DrGRPO,
        "cispo": CISPO,
        "sapo": SAPO,
        "luspo": LUSPO,
        "vespo": VESPO,
        "dppo_tv": DPPOTV,
        "dppo_kl": DPPOKL,
    }
)


def make_policy_loss(name: str, options: Mapping[str, float | None] | None = None) -> AbstractPolicyLoss:
    """The loss of a name.

    **Arguments:**

    - `name`: a key of `POLICY_LOSSES`.
    - `options`: of the loss, by name; `None` stands for its own default, and options of other losses are left aside.

    **Raises:**

    `UserError` if there is no such loss.
    """
    if name not in POLICY_LOSSES:
        raise UserError(f"there is no loss_type {name!r}.{did_you_mean(name, tuple(POLICY_LOSSES))}")
    loss: Any = POLICY_LOSSES[name]
    given = {} if options is None else options
    return loss(**{key: given[key] for key in options_of(loss) if given.get(key) is not None})
