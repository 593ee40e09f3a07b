"""What a configuration can name as a draft's loss."""

from dataclasses import dataclass

from ._base import AbstractDraftLoss


@dataclass(frozen=True)
class DraftLossKind:
    """A loss that a configuration can name. It stands as `LOSS` at the end of the loss's file.

    **Arguments:**

    - `loss`: it itself.
    - `summary`: what it is and what it is for, in a few words.
    """

    loss: AbstractDraftLoss
    summary: str
