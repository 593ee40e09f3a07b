from ._base import (
    AbstractDraft as AbstractDraft,
    DraftError as DraftError,
    Proposal as Proposal,
    check_fit as check_fit,
    pick_positions as pick_positions,
)
from ._digest import draft_digest as draft_digest
from ._eagle import EagleDraft as EagleDraft
from ._fallback import FallbackDraft as FallbackDraft
from ._history import AbstractHistoryDraft as AbstractHistoryDraft, remember as remember
from ._hydra import HydraHeads as HydraHeads
from ._kind import DraftKind as DraftKind
from ._kinds import (
    DRAFT_KINDS as DRAFT_KINDS,
    OWN_CLASS as OWN_CLASS,
    draft_options as draft_options,
    fresh_draft as fresh_draft,
)
from ._layer_skip import EarlyExit as EarlyExit, ExitAdapter as ExitAdapter, LayerSkipDraft as LayerSkipDraft
from ._markov import MarkovHeads as MarkovHeads
from ._medusa import MedusaHeads as MedusaHeads
from ._model import (
    ModelDraft as ModelDraft,
    check_same_vocabulary as check_same_vocabulary,
    load_model_draft as load_model_draft,
)
from ._ngram import NGramDraft as NGramDraft
from ._none import NoDraft as NoDraft
from ._sampler import (
    AbstractSampler as AbstractSampler,
    CoupledSampler as CoupledSampler,
    IndependentSampler as IndependentSampler,
)
from ._save import (
    DraftWarning as DraftWarning,
    check_saved_sizes as check_saved_sizes,
    describe_saved_draft as describe_saved_draft,
    draft_kind as draft_kind,
    load_draft as load_draft,
    save_draft as save_draft,
)
from ._tempered import (
    MOST_STEPS as MOST_STEPS,
    TemperedDraft as TemperedDraft,
    TemperedSampler as TemperedSampler,
    steps_to_temperature as steps_to_temperature,
    tempered_part as tempered_part,
    with_temperature as with_temperature,
)
from ._vocabulary import (
    AbstractDraftVocabulary as AbstractDraftVocabulary,
    FullVocabulary as FullVocabulary,
    ReducedVocabulary as ReducedVocabulary,
    completion_tokens as completion_tokens,
    coverage as coverage,
    draft_vocabulary as draft_vocabulary,
    has_vocabulary as has_vocabulary,
    most_used_tokens as most_used_tokens,
    with_vocabulary as with_vocabulary,
)
