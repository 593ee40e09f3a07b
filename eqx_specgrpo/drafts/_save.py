"""Drafts on disk: `draft.json` says what it is and whom it was made for, `draft.safetensors` holds its weights."""

import json
from pathlib import Path
from typing import Any

import jax.random as jr
from safetensors import SafetensorError
from safetensors.numpy import save_file

from .._errors import CheckpointError, UserError
from .._tree_file import named_arrays, read_tree
from ..models import AbstractLanguageModel
from ._base import AbstractDraft, DraftError
from ._hydra import HydraHeads
from ._medusa import MedusaHeads


def save_draft(folder: Path, draft: AbstractDraft, target: AbstractLanguageModel, target_name: str) -> None:
    """Writes a draft's folder.

    **Arguments:**

    - `folder`: made if it is not there.
    - `draft`: in float32.
    - `target`, `target_name`: whom it was trained for; the sizes and the name are kept with it.

    **Raises:**

    `UserError` if the folder can't be written, a full disk included.
    """
    about = {
        "kind": draft_kind(draft),
        "settings": draft.provenance(),
        "target": {"name": target_name, "hidden_size": target.hidden_size, "vocab_size": target.vocab_size},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(named_arrays(draft), folder / "draft.safetensors")
        (folder / "draft.safetensors").chmod(0o644)  # safetensors makes it readable for its owner alone
        (folder / "draft.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the draft could not be written to {folder}: {error}; make room there, then try again"
        ) from error


def load_draft(folder: Path, target: AbstractLanguageModel) -> AbstractDraft:
    """Reads a draft's folder and checks that it fits.

    **Raises:**

    `CheckpointError` if the folder is incomplete or damaged; `DraftError`, naming both sides, if the draft was made for
    another target.
    """
    path = folder / "draft.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        made_for = dict(about["target"])
        template = _build(about["kind"], dict(about["settings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} can't be read as a saved draft ({error}): name a folder that `specgrpo run` has written as draft/"
        ) from error
    sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    for name, size in sizes.items():
        if made_for.get(name) != size:
            raise DraftError(
                f"the draft in {folder} was trained for {made_for.get('name')!r} with {name} {made_for.get(name)}, but "
                f"this target's is {size}: use a draft trained for this target, or start from fresh heads"
            )
    try:
        draft, _ = read_tree(folder / "draft.safetensors", template, "Restore the folder, or start from fresh heads")
    except SafetensorError as error:
        raise CheckpointError(f"{folder / 'draft.safetensors'} can't be read: {error}") from error
    draft.check(target)
    return draft


def draft_kind(draft: AbstractDraft) -> str:
    """The name of a draft's architecture in `draft.json`."""
    match draft:
        case MedusaHeads():
            return "medusa"
        case HydraHeads():
            return "hydra"
        case _:
            return f"{type(draft).__module__}:{type(draft).__qualname__}"


def _build(kind: str, settings: dict[str, Any]) -> AbstractDraft:
    match kind:
        case "medusa":
            return MedusaHeads.fresh(settings["hidden_size"], settings["num_heads"])
        case "hydra":
            return HydraHeads(settings["hidden_size"], settings["num_heads"], settings["inner_size"], key=jr.key(0))
        case _:
            raise CheckpointError(
                f"a draft of kind {kind!r} can't be loaded by this version: known are 'medusa' and 'hydra'"
            )
