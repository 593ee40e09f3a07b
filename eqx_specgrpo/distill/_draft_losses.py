"""The draft losses by name."""

from collections.abc import Mapping

from ..choices import DRAFT_LOSSES, described
from ..errors import UserError, did_you_mean
from ._base import AbstractDraftLoss
from ._draft_loss_kind import DraftLossKind

# By what a configuration calls them; each is described at the end of its file.
DRAFT_LOSS_KINDS: Mapping[str, DraftLossKind] = described(__package__ or "", DRAFT_LOSSES, "LOSS", DraftLossKind)


def make_draft_loss(name: str) -> AbstractDraftLoss:
    """Returns the draft loss with this name.

    **Raises:**

    `UserError` if there is no such loss.
    """
    if name not in DRAFT_LOSS_KINDS:
        raise UserError(f"there is no draft loss {name!r}.{did_you_mean(name, DRAFT_LOSS_KINDS)}")
    return DRAFT_LOSS_KINDS[name].loss
