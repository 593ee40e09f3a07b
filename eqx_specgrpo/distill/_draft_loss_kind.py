"""What a configuration can name as a draft's loss."""

from dataclasses import dataclass

from ._base import AbstractDraftLoss


@dataclass(frozen=True)
class DraftLossKind:
    """Description of a draft loss, by which a configuration can name it. Each loss's file ends with one, `LOSS`.

    **Arguments:**

    - `loss`: the loss.
    - `summary`: what it is and what it is for, in a few words.
    """

    loss: AbstractDraftLoss
    summary: str
