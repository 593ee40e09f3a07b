"""What the library knows of each kind of draft."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import PRNGKeyArray

from ..choices import Options, options_of
from ..models import AbstractLanguageModel, Tokenizer, Transformer
from ._base import AbstractDraft, DraftError


def _fits_any(max_length: int, **options: Any) -> None:
    del max_length, options


@dataclass(frozen=True)
class DraftKind:
    """Description of a kind of draft, by which a configuration can name it. Each draft's file ends with one, `DRAFT`.

    **Arguments:**

    - `draft`: the class.
    - `fresh`: makes a fresh one, as `fresh(target, max_length, key=key, **options)`. Its further keyword arguments are
        the options of the kind: the keys of `[draft.options]`, checked against their annotations, and described in its
        docstring. If it has an argument `tokenizer`, that is the target's, or `None`.
    - `rebuild`: makes an equal module from the settings that `provenance()` gave, into which the weights are loaded.
        Any `ValueError`, `KeyError` or `TypeError` of it means that they are not such settings.
    - `check`: raises `ValueError` if `max_length` and the options do not go together. Called as `check(max_length,
        **options)` before any model is loaded.
    - `needs_learning`: a fresh draft of this kind is rarely right, because it begins by predicting the next token in
        place of the one after it.
    - `has_probabilities`: the draft draws its tokens from distributions, so that it can have a vocabulary and
        temperatures.
    """

    draft: type[AbstractDraft]
    fresh: Callable[..., AbstractDraft]
    rebuild: Callable[[dict[str, Any]], AbstractDraft]
    check: Callable[..., None] = _fits_any
    needs_learning: bool = False
    has_probabilities: bool = True


@dataclass(frozen=True)
class DraftWrapper:
    """A draft made of drafts, which configurations put around others: how it is taken apart, and put together again.

    **Arguments:**

    - `draft`: the class.
    - `parts`: its drafts, by name.
    - `rebuild`: makes it again, as `rebuild(**parts)`; a `ValueError` or `TypeError` means that these are not its
        parts.
    """

    draft: type[AbstractDraft]
    parts: Callable[[Any], Mapping[str, AbstractDraft]]
    rebuild: Callable[..., AbstractDraft]


def options_of_draft(name: str, make: Callable[..., Any]) -> Options:
    """The options of a kind, or of a class of the user's own.

    **Arguments:**

    - `name`: of the kind, or how the class is found.
    - `make`: is called as `make(target, max_length, key=key, **options)`.
    """
    options = options_of(make, f"the draft {name!r}", "draft.options.", given=("key", "tokenizer"), first=2)
    # One that only a `**` takes could not be told from the rest of `provenance()`, when the draft is made again.
    return dataclasses.replace(options, open_ended=False)


def call_fresh(
    make: Callable[..., Any],
    target: AbstractLanguageModel,
    max_length: int,
    *,
    options: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    key: PRNGKeyArray,
) -> Any:
    """What `make` makes of options that have been read; it is handed the tokenizer if it asks for one."""
    wanted = {"tokenizer": tokenizer} if "tokenizer" in inspect.signature(make).parameters else {}
    return make(target, max_length, key=key, **wanted, **options)


def as_transformer(target: AbstractLanguageModel, kind: str) -> Transformer:
    """The target, for kinds that are made after its layers.

    **Raises:**

    `DraftError` if it is no `Transformer`.
    """
    if not isinstance(target, Transformer):
        raise DraftError(
            f"a draft of kind {kind!r} is made of the layers of a Transformer, but the target is a "
            f"{type(target).__name__}: use another kind"
        )
    return target
