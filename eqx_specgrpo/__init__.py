"""GRPO with lossless, continuously distilled speculative decoding. The headline names; each station has the rest.

They are imported when they are first used: neither `import eqx_specgrpo` alone nor `specgrpo --help` waits
for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._types import Prompts as Prompts, Rollouts as Rollouts, ScoredRollouts as ScoredRollouts
    from .config import (
        RunConfig as RunConfig,
        default_draft_path as default_draft_path,
        default_model_path as default_model_path,
        load_config as load_config,
    )
    from .decoding import (
        AdaptiveLength as AdaptiveLength,
        Block as Block,
        Coupled as Coupled,
        FixedLength as FixedLength,
        GreedyMatch as GreedyMatch,
        GreedySampling as GreedySampling,
        Rejection as Rejection,
        Sampling as Sampling,
        StopStrings as StopStrings,
        decode as decode,
    )
    from .drafts import (
        AbstractDraft as AbstractDraft,
        EagleDraft as EagleDraft,
        FallbackDraft as FallbackDraft,
        HydraHeads as HydraHeads,
        LayerSkipDraft as LayerSkipDraft,
        MedusaHeads as MedusaHeads,
        ModelDraft as ModelDraft,
        NGramDraft as NGramDraft,
        NoDraft as NoDraft,
        load_draft as load_draft,
        save_draft as save_draft,
    )
    from .errors import UserError as UserError
    from .models import load_pretrained as load_pretrained
    from .runtime import keep_compiled_programs as keep_compiled_programs, keep_freed_memory as keep_freed_memory
    from .train import (
        AbstractCallback as AbstractCallback,
        RunResult as RunResult,
        RunView as RunView,
        run as run,
    )

# Where a headline name is; the test of the structure holds it to be what stands above.
_HOMES = {
    "_types": ("Prompts", "Rollouts", "ScoredRollouts"),
    "config": ("RunConfig", "default_draft_path", "default_model_path", "load_config"),
    "decoding": (
        *("AdaptiveLength", "FixedLength", "Block", "Coupled", "GreedyMatch", "Rejection"),
        *("GreedySampling", "Sampling", "StopStrings", "decode"),
    ),
    "drafts": (
        *("AbstractDraft", "EagleDraft", "FallbackDraft", "HydraHeads", "LayerSkipDraft", "MedusaHeads", "ModelDraft"),
        *("NGramDraft", "NoDraft", "load_draft", "save_draft"),
    ),
    "errors": ("UserError",),
    "models": ("load_pretrained",),
    "runtime": ("keep_compiled_programs", "keep_freed_memory"),
    "train": ("AbstractCallback", "RunResult", "RunView", "run"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = vars(importlib.import_module(f".{_HOME_OF[name]}", __name__))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
