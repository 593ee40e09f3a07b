from ._base import AbstractDraft as AbstractDraft, DraftError as DraftError, Proposal as Proposal
from ._hydra import HydraHeads as HydraHeads
from ._medusa import MedusaHeads as MedusaHeads
from ._none import NoDraft as NoDraft
from ._sampler import (
    AbstractSampler as AbstractSampler,
    CoupledSampler as CoupledSampler,
    IndependentSampler as IndependentSampler,
)
from ._save import draft_kind as draft_kind, load_draft as load_draft, save_draft as save_draft
