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
from ..files import absolute_spec, import_spec_of, is_import_spec, named_arrays, read_tree
from ..models import AbstractLanguageModel, with_grouped_outputs
from ._base import AbstractDraft, DraftError, check_fit
from ._fingerprint import SAME_MODEL, fingerprint, similarity
from ._kinds import DRAFT_KINDS, OWN_CLASS, WRAPPERS, draft_options, fresh_draft, name_of_kind
from ._vocabulary import ReducedVocabulary, draft_vocabulary, most_used_tokens, with_vocabulary

# 1: the outputs of layers that one product computes lie one after the other; 2: in groups.
_FORMAT = 2


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
        "format": _FORMAT,
        "kind": _kind_from(folder, draft_kind(draft, kind)),
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
    draft = draft if about["format"] > 1 else with_grouped_outputs(draft)
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
    return {"kind": _kind_in(folder, kind), "max_length": about["max_length"], "ngram": is_fallback}


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "draft.json").read_text(encoding="utf-8"))
        kind, length = about["kind"], about["max_length"]
        settings, target = dict(about["settings"]), dict(about["target"])
        vocabulary, version = about.get("vocabulary", 0), about.get("format", 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    if not isinstance(kind, str) or not isinstance(length, int):
        raise _unreadable(folder, TypeError("kind must be text and max_length a whole number"))
    if not isinstance(vocabulary, int):
        raise _unreadable(folder, TypeError("vocabulary must be how many tokens the draft has, 0 for all"))
    if version not in range(1, _FORMAT + 1):
        raise CheckpointError(
            f"{folder / 'draft.json'} is of format {version}, and this version of eqx_specgrpo reads up to {_FORMAT}: "
            "update it"
        )
    return {
        "format": version,
        "kind": _kind_in(folder, kind),
        "max_length": length,
        "settings": settings,
        "vocabulary": vocabulary,
        "target": target,
    }


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
    return name_of_kind(draft) or (absolute_spec(own) if own else import_spec_of(type(draft)))


def _kind_from(folder: Path, kind: str) -> str:
    """As it is kept in a folder: a class whose file lies in there is found from there, so that both may be moved."""
    source, colon, name = kind.rpartition(":")
    inside = Path(source)
    if source.endswith(".py") and inside.is_relative_to(os.path.abspath(folder)):
        return f"{inside.relative_to(os.path.abspath(folder)).as_posix()}{colon}{name}"
    return kind


def _kind_in(folder: Path, kind: str) -> str:
    """What `_kind_from` kept; other relative paths, of drafts saved before, are those of the folder started in."""
    source, colon, name = kind.rpartition(":")
    if source.endswith(".py") and (folder / source).is_file():
        return absolute_spec(f"{folder / source}{colon}{name}")
    return absolute_spec(kind) if is_import_spec(kind) else kind


def _settings(draft: AbstractDraft, own: str | None) -> dict[str, Any]:
    """What `_build` needs besides the kind: those of a draft made of drafts say the kinds of its parts."""
    wrapper = WRAPPERS.get(name_of_kind(draft) or "")
    if wrapper is None:
        return draft.provenance()
    source = own.rpartition(":")[0] if own else None
    found = {}
    for name, part in wrapper.parts(draft).items():
        # What `own` names may have made the whole of them: a part is found by its own class, in the same place.
        its_own = f"{source}:{type(part).__qualname__}" if source else None
        settings = _settings(part, its_own)
        found[name] = {"kind": draft_kind(part, its_own), "max_length": part.max_length, "settings": settings}
    return found


def _build(kind: str, settings: dict[str, Any], max_length: int, target: AbstractLanguageModel) -> AbstractDraft:
    if kind in DRAFT_KINDS:
        return DRAFT_KINDS[kind].rebuild(settings)
    if kind in WRAPPERS:
        parts = {
            name: _build(part["kind"], dict(part["settings"]), part["max_length"], target)
            for name, part in settings.items()
        }
        return WRAPPERS[kind].rebuild(**parts)
    if is_import_spec(kind):
        return _build_own(kind, settings, max_length, target)
    raise CheckpointError(
        f"a draft of kind {kind!r} can't be loaded by this version: known are "
        f"{', '.join(repr(name) for name in (*DRAFT_KINDS, *WRAPPERS))}, and {OWN_CLASS}"
    )


def _build_own(kind: str, settings: dict[str, Any], max_length: int, target: AbstractLanguageModel) -> AbstractDraft:
    """Made as at first, with those of the settings that are options of the class."""
    try:
        options = draft_options(kind)
        told = {name: value for name, value in settings.items() if name in options.names}
        draft = fresh_draft(kind, target, max_length, options=told, key=jr.key(0))
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
