"""All kinds of drafts, and the one place that makes a draft of its name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxtyping import PRNGKeyArray

from ..choices import DRAFTS, Options, described
from ..errors import UserError, did_you_mean
from ..files import import_callable, is_import_spec
from ..models import AbstractLanguageModel, Tokenizer
from ._base import AbstractDraft, DraftError
from ._custom import custom_draft
from ._fallback import WRAPPER as FALLBACK
from ._kind import DraftKind, DraftWrapper, call_fresh, options_of_draft
from ._tempered import WRAPPER as TEMPERED

# The kinds that a configuration names, each described at the end of its file.
DRAFT_KINDS: Mapping[str, DraftKind] = described(__package__ or "", DRAFTS, "DRAFT", DraftKind)
# What configurations put around them.
WRAPPERS: Mapping[str, DraftWrapper] = MappingProxyType({"fallback": FALLBACK, "tempered": TEMPERED})
OWN_CLASS = "a class of your own as file.py:Class or package.module:Class"


def draft_options(kind: str) -> Options:
    """Returns the options of a kind of draft, which are the keys of `[draft.options]`.

    **Arguments:**

    - `kind`: a name, or `file.py:MyDraft` or `package.module:MyDraft`, whose file or module is imported.

    **Raises:**

    `UserError` if there is no such draft.
    """
    if kind in DRAFT_KINDS:
        return options_of_draft(kind, DRAFT_KINDS[kind].fresh)
    if is_import_spec(kind):
        return options_of_draft(kind, import_callable(kind, "draft", "class"))
    raise UserError(f"there is no draft {kind!r}.{did_you_mean(kind, DRAFT_KINDS)} (Or {OWN_CLASS}.)")


def fresh_draft(
    kind: str,
    target: AbstractLanguageModel,
    max_length: int,
    *,
    options: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: Tokenizer | None = None,
    key: PRNGKeyArray,
) -> AbstractDraft:
    """Makes a draft that has not learned yet.

    **Arguments:**

    - `kind`: one of `DRAFT_KINDS`, or how a class (or function) of the user's own is found: `file.py:MyDraft` or
        `package.module:MyDraft`. It is called as `MyDraft(target, max_length, key=key, **options)`.
    - `target`: the model that it drafts for.
    - `max_length`: the most tokens that it can guess in a round.
    - `options`: the kind's own, as `draft_options` describes them.
    - `tokenizer`: of the target, for kinds that ask for it.
    - `key`: for fresh weights.

    **Raises:**

    `UserError` if there is no such draft or option; `DraftError` if a class of the user's own raises, returns no draft,
    or one that drafts another number of tokens.
    """
    read = draft_options(kind).read(options)
    if kind in DRAFT_KINDS:
        known = DRAFT_KINDS[kind]
        try:
            known.check(max_length, **read)
        except ValueError as error:
            raise DraftError(str(error)) from error
        return call_fresh(known.fresh, target, max_length, options=read, tokenizer=tokenizer, key=key)
    draft = custom_draft(kind, target, max_length, options=read, tokenizer=tokenizer, key=key)
    if name_of_kind(draft) is None:
        untold = [name for name in options if name not in draft.provenance()]
        if untold:
            raise DraftError(
                f"{kind} was given the option {untold[0]!r}, but {type(draft).__name__}.provenance() does not tell it: "
                "add it there, so that the draft can be made again when it is loaded"
            )
    return draft


def name_of_kind(draft: AbstractDraft) -> str | None:
    """The name of a draft's class among the library's kinds and wrappers; `None` for any other class."""
    # By the class itself: a subclass of one of these is another draft, which its own class has to make again.
    names = {entry.draft: name for entries in (DRAFT_KINDS, WRAPPERS) for name, entry in entries.items()}
    return names.get(type(draft))
