from ._base import AbstractDraft as AbstractDraft, DraftError as DraftError, Proposal as Proposal
from ._medusa import MedusaHeads as MedusaHeads
from ._none import NoDraft as NoDraft
