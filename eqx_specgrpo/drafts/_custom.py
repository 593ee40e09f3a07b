"""A draft of the user's own class, named as `path/to/file.py:MyDraft` or `package.module:MyDraft`."""

import traceback

from jaxtyping import PRNGKeyArray

from ..errors import UserError
from ..files import import_callable
from ..models import AbstractLanguageModel
from ._base import AbstractDraft, DraftError


def custom_draft(spec: str, target: AbstractLanguageModel, max_length: int, *, key: PRNGKeyArray) -> AbstractDraft:
    """Calls `factory(target, max_length, key=key)`, where `spec` says which class or function the factory is.

    **Raises:**

    `UserError` if it can't be found or imported; `DraftError` if it raises, returns no draft, or one that drafts fewer
    tokens than were asked for.
    """
    factory = import_callable(spec, "draft", "class")
    try:
        draft = factory(target, max_length, key=key)
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise DraftError(
            f"{spec} raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno}); it is called as "
            "factory(target, max_length, key=key) and must return a draft"
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
