"""The policy as others are given it: to a draft that is made for it, and to who loads what a run has written."""

from pathlib import Path

from ..config import RunParts, default_model_path, is_given
from ..errors import UserError
from ..models import AbstractLanguageModel, AdaptedTransformer, Transformer, locate, save_adapter, save_model


def whole_model(policy: AbstractLanguageModel) -> AbstractLanguageModel:
    """What a fresh draft is made for, and a saved one compared with: the policy, or the base of one with adapters.

    Their embeddings and sizes are the same, and so is the kind of their layers.
    """
    return policy.base if isinstance(policy, AdaptedTransformer) else policy


def save_policy(parts: RunParts, policy: AbstractLanguageModel, folder: Path) -> None:
    """Writes `policy/`: a Hugging Face folder of the whole model, an adapter in `policy/adapter`, or both.

    **Raises:**

    `UserError` if it can't be written.
    """
    config = parts.config
    source = _source(parts)
    if not isinstance(policy, AdaptedTransformer):
        _save_whole(parts, policy, folder, source)
        return
    if config.lora.save_merged:  # Before the adapter: it replaces the folder as a whole.
        _save_whole(parts, policy.merged("float32"), folder, source)
    name = config.model.path or str(source)
    save_adapter(policy.adapters, folder / "adapter", policy.base, name)


def _source(parts: RunParts) -> Path | None:
    """Where the model came from; `None` for one that a script has handed over."""
    model = parts.config.model
    if is_given(model.path):
        return None
    return locate(model.path, model.revision) if model.path else default_model_path()


def _save_whole(parts: RunParts, model: AbstractLanguageModel, folder: Path, source: Path | None) -> None:
    if not isinstance(model, Transformer):
        raise UserError(f"policy/ is written for a Transformer, but the policy is a {type(model).__name__}")
    save_model(model, folder, parts.tokenizer, source if source is not None and source.is_dir() else None)
