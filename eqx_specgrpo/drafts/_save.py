"""Drafts on disk: `draft.json` says what it is and whom it was made for, `draft.safetensors` holds its weights."""

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..errors import CheckpointError, UserError
from ..files import import_spec_of, is_import_spec, named_arrays, read_tree
from ..models import AbstractLanguageModel
from ._base import AbstractDraft, DraftError, check_fit
from ._custom import custom_draft
from ._eagle import EagleDraft
from ._fallback import FallbackDraft
from ._fingerprint import SAME_MODEL, fingerprint, similarity
from ._history import AbstractHistoryDraft
from ._hydra import HydraHeads
from ._layer_skip import LayerSkipDraft
from ._medusa import MedusaHeads
from ._model import ModelDraft, build_model_draft
from ._ngram import NGramDraft
from ._tempered import TemperedDraft
from ._vocabulary import ReducedVocabulary, draft_vocabulary, most_used_tokens, with_vocabulary

_KINDS: dict[type[AbstractDraft], str] = {
    MedusaHeads: "medusa",
    HydraHeads: "hydra",
    EagleDraft: "eagle",
    ModelDraft: "model",
    LayerSkipDraft: "layer_skip",
    NGramDraft: "ngram",
    FallbackDraft: "fallback",
    TemperedDraft: "tempered",
}


class DraftWarning(UserWarning):
    """A draft that fits its target in size, but was trained for another model."""


def save_draft(
    folder: Path, draft: AbstractDraft, target: AbstractLanguageModel, target_name: str, kind: str | None = None
) -> None:
    """Writes a draft's folder; what was there is replaced file by file, each of them whole at any instant.

    **Arguments:**

    - `folder`: made if it is not there.
    - `draft`: in float32.
    - `target`, `target_name`: whom it was trained for; the sizes, the name and a fingerprint are kept with it.
    - `kind`: for a class of your own, how it is found: `path/to/file.py:MyDraft` or `package.module:MyDraft`. By
        default its module, or the file if it came from one or is defined in the script that is being run.

    **Raises:**

    `UserError` if the folder can't be written, a full disk included.
    """
    about = {
        "kind": draft_kind(draft, kind),
        "max_length": draft.max_length,
        "settings": _settings(draft, kind),
        "vocabulary": draft_vocabulary(draft).size,
        "target": {
            "name": target_name,
            "hidden_size": target.hidden_size,
            "vocab_size": target.vocab_size,
            "fingerprint": fingerprint(target),
        },
    }
    aside = folder / ".tmp-draft.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(named_arrays(draft), aside)
        aside.chmod(0o644)  # safetensors makes it readable for its owner alone
        _put_in_place(aside, folder / "draft.safetensors")
        aside = folder / ".tmp-draft.json"
        aside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        _put_in_place(aside, folder / "draft.json")
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(
            f"the draft could not be written to {folder}: {error}; make room there, then try again"
        ) from error


def load_draft(folder: Path, target: AbstractLanguageModel) -> AbstractDraft:
    """Reads a draft's folder and checks that it fits.

    A draft of a class of your own is made by that class: the file or module that `draft.json` names is imported.

    A draft that was trained for another model of the same sizes gets a `DraftWarning` that names both, and is used: it
    can only cost speed, never change what is generated. A later version of the same model, as training makes them, is
    no other model.

    **Raises:**

    `CheckpointError` if the folder is incomplete or damaged, or its class can't be found; `DraftError`, naming both
    sides, if the draft was made for a target of other sizes.
    """
    folder = Path(folder)
    about = _read_about(folder)
    made_for = about["target"]
    check_saved_sizes(folder, target.hidden_size, target.vocab_size)
    try:
        template = _build(about["kind"], dict(about["settings"]), about["max_length"], target)
        if about["vocabulary"] > target.vocab_size:
            raise DraftError(
                f"the draft in {folder} has a vocabulary of {about['vocabulary']} tokens, but this target's is "
                f"{target.vocab_size}: use a draft trained for this target, or start from a fresh one"
            )
        if about["vocabulary"]:
            ids = most_used_tokens(np.zeros(0, int), about["vocabulary"], target.vocab_size)
            template = with_vocabulary(template, ReducedVocabulary(ids))
    except (CheckpointError, DraftError):
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    try:
        draft, _ = read_tree(folder / "draft.safetensors", template, "Restore the folder, or start from a fresh draft")
    except SafetensorError as error:
        raise CheckpointError(f"{folder / 'draft.safetensors'} can't be read: {error}") from error
    check_fit(draft, target)
    _check_same_model(folder, made_for, target)
    return draft


def check_saved_sizes(folder: Path, hidden_size: int, vocab_size: int) -> None:
    """Raises `DraftError`, naming both sides, if a saved draft was made for a target of other sizes; loads nothing."""
    made_for = _read_about(folder)["target"]
    for name, size in {"hidden_size": hidden_size, "vocab_size": vocab_size}.items():
        if made_for.get(name) != size:
            raise DraftError(
                f"the draft in {folder} was trained for {made_for.get('name')!r} with {name} {made_for.get(name)}, but "
                f"this target's is {size}: use a draft trained for this target, or start from a fresh one"
            )


def describe_saved_draft(folder: Path) -> dict[str, Any]:
    """What a saved draft is, without loading it: `kind`, `max_length`, and `ngram`: whether a lookup stands before it.

    **Raises:**

    `CheckpointError` if there is none, or it can't be read.
    """
    about = _read_about(folder)
    kind, settings = about["kind"], about["settings"]
    try:
        is_fallback = kind == "fallback" and settings["first"]["kind"] == "ngram"
        part = settings["then"] if is_fallback else about
        kind = part["settings"]["draft"]["kind"] if part["kind"] == "tempered" else part["kind"]
    except (KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    return {"kind": kind, "max_length": about["max_length"], "ngram": is_fallback}


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "draft.json").read_text(encoding="utf-8"))
        kind, length = about["kind"], about["max_length"]
        settings, target = dict(about["settings"]), dict(about["target"])
        vocabulary = about.get("vocabulary", 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    if not isinstance(kind, str) or not isinstance(length, int):
        raise _unreadable(folder, TypeError("kind must be text and max_length a whole number"))
    if not isinstance(vocabulary, int):
        raise _unreadable(folder, TypeError("vocabulary must be how many tokens the draft has, 0 for all"))
    return {"kind": kind, "max_length": length, "settings": settings, "vocabulary": vocabulary, "target": target}


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder / 'draft.json'} can't be read as a saved draft ({error!r}): name a folder that `specgrpo distill` "
        "has written, or draft/ of a run"
    )


def _put_in_place(aside: Path, path: Path) -> None:
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def _check_same_model(folder: Path, made_for: dict[str, Any], target: AbstractLanguageModel) -> None:
    try:
        alike = similarity(made_for["fingerprint"], fingerprint(target))
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder, error) from error
    if alike < SAME_MODEL:
        warnings.warn(
            f"the draft in {folder} was trained for {made_for.get('name')!r}, and this target is another model of the "
            f"same sizes: their embeddings are alike to {alike:.2f}, where 1 is the same. What is generated stays the "
            "target's, but guesses will rarely be right: use a draft trained for this target, or distil one with "
            "`specgrpo distill`",
            DraftWarning,
            stacklevel=3,
        )


def draft_kind(draft: AbstractDraft, own: str | None = None) -> str:
    """The name of a draft's architecture in `draft.json`; `own` is how a class outside the library is found."""
    # By the class itself: a subclass of one of these is another draft, which its own class has to make again.
    return _KINDS.get(type(draft)) or own or import_spec_of(type(draft))


def _settings(draft: AbstractDraft, own: str | None) -> dict[str, Any]:
    """What `_build` needs besides the kind: those of a draft made of drafts say the kinds of its parts."""
    match draft:
        case FallbackDraft():
            parts = {"first": draft.first, "then": draft.then}
        case TemperedDraft():
            parts = {"draft": draft.draft}
        case _:
            return draft.provenance()
    source = own.rpartition(":")[0] if own else None
    found = {}
    for name, part in parts.items():
        # What `own` names may have made the whole of them: a part is found by its own class, in the same place.
        its_own = f"{source}:{type(part).__qualname__}" if source else None
        settings = _settings(part, its_own)
        found[name] = {"kind": draft_kind(part, its_own), "max_length": part.max_length, "settings": settings}
    return found


def _build(kind: str, settings: dict[str, Any], max_length: int, target: AbstractLanguageModel) -> AbstractDraft:
    match kind:
        case "medusa":
            return MedusaHeads.fresh(settings["hidden_size"], settings["num_heads"])
        case "hydra":
            return HydraHeads(settings["hidden_size"], settings["num_heads"], settings["inner_size"], key=jr.key(0))
        case "eagle":
            layers = tuple(settings.pop("layers"))
            return EagleDraft(layers=layers, **settings, key=jr.key(0))
        case "model":
            return build_model_draft(settings)
        case "layer_skip":
            return LayerSkipDraft(
                settings["hidden_size"],
                settings["num_layers"],
                settings["max_length"],
                settings["inner_size"],
                key=jr.key(0),
            )
        case "ngram":
            return NGramDraft(**settings)
        case "fallback":
            first, then = _build_part(settings["first"], target), _build_part(settings["then"], target)
            if not isinstance(first, AbstractHistoryDraft):
                raise ValueError(
                    f"the first of a fallback is of kind {settings['first']['kind']!r}, which has no matches"
                )
            return FallbackDraft(first, then)
        case "tempered":
            return TemperedDraft(_build_part(settings["draft"], target))
        case _ if is_import_spec(kind):
            return _build_own(kind, settings, max_length, target)
        case _:
            raise CheckpointError(
                f"a draft of kind {kind!r} can't be loaded by this version: known are 'medusa', 'hydra', 'eagle', "
                "'model', 'layer_skip', 'ngram', 'fallback', 'tempered', and a class of your own as file.py:Class"
            )


def _build_part(about: dict[str, Any], target: AbstractLanguageModel) -> AbstractDraft:
    return _build(about["kind"], dict(about["settings"]), about["max_length"], target)


def _build_own(kind: str, settings: dict[str, Any], max_length: int, target: AbstractLanguageModel) -> AbstractDraft:
    try:
        draft = custom_draft(kind, target, max_length, key=jr.key(0))
    except UserError as error:
        raise CheckpointError(
            f"this draft is of the class {kind}, which can't be made: {error} Where the class has moved, write its new "
            'place into "kind" of draft.json'
        ) from error
    if json.loads(json.dumps(draft.provenance())) != settings:
        raise CheckpointError(
            f"this draft was saved by {kind} with the settings {settings}, but the class makes {draft.provenance()} "
            "now: put its old sizes back, or start from a fresh draft"
        )
    return draft
