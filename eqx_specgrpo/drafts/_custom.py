"""A draft of the user's own class, named as `path/to/file.py:MyDraft` or `package.module:MyDraft`."""

import traceback
from collections.abc import Mapping
from typing import Any

from jaxtyping import PRNGKeyArray

from ..errors import UserError
from ..files import import_callable
from ..models import AbstractLanguageModel, Tokenizer
from ._base import AbstractDraft, DraftError
from ._kind import call_fresh


def custom_draft(
    spec: str,
    target: AbstractLanguageModel,
    max_length: int,
    *,
    options: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    key: PRNGKeyArray,
) -> AbstractDraft:
    """Calls `factory(target, max_length, key=key, **options)`, where `spec` says which class or function it is.

    **Raises:**

    `UserError` if it can't be found or imported; `DraftError` if it raises, returns no draft, or one that drafts
    another number of tokens.
    """
    factory = import_callable(spec, "draft", "class")
    try:
        draft = call_fresh(factory, target, max_length, options=options, tokenizer=tokenizer, key=key)
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise DraftError(
            f"{spec} raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno}); it is called as "
            "factory(target, max_length, key=key, **options) and must return a draft"
        ) from error
    if not isinstance(draft, AbstractDraft):
        raise DraftError(
            f"{spec} returned {type(draft).__name__}, but a draft must be a subclass of "
            "eqx_specgrpo.drafts.AbstractDraft: return one from factory(target, max_length, key=key)"
        )
    if draft.max_length != max_length:
        raise DraftError(
            f"{spec} was asked for a draft of max_length {max_length} and returned one of {draft.max_length}: set "
            f"draft.max_length={draft.max_length}, or let it use its argument max_length"
        )
    return draft
