"""The keys of `[draft.options]`: which draft each belongs to."""

from collections.abc import Mapping
from typing import Any

from ..choices import Options
from ..drafts import DRAFT_KINDS, draft_options
from ..errors import ConfigError, did_you_mean

LOOKUP = "ngram"  # the kind that `draft.ngram = true` puts in front of another


def split_options(kind: str, ngram: bool, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the draft itself, and those of the lookup in front of it. A name of both is the draft's own.

    **Raises:**

    `ConfigError` for an option of neither, `UserError` if a class of the user's own can't be found.
    """
    own = draft_options(kind)
    in_front = draft_options(LOOKUP).names if ngram else ()
    for name, value in values.items():
        if name not in own.names and name not in in_front:
            raise ConfigError(_no_such_option(name, value, own, in_front, kind))
    return (
        {name: value for name, value in values.items() if name in own.names},
        {name: value for name, value in values.items() if name not in own.names},
    )


def check_options(kind: str, ngram: bool, max_length: int, values: Mapping[str, Any], *, complete: bool) -> None:
    """Checks options as far as can be without a model.

    **Arguments:**

    - `complete`: whether those without a default have to be there: not where a saved draft is to be loaded.

    **Raises:**

    `UserError` for an option that there is not, one that is missing, or a value of the wrong type or out of range.
    """
    own, in_front = split_options(kind, ngram, values)
    read = draft_options(kind).read(own, complete=complete)
    if kind in DRAFT_KINDS:
        DRAFT_KINDS[kind].check(max_length, **read)
    DRAFT_KINDS[LOOKUP].check(max_length, **draft_options(LOOKUP).read(in_front))


def with_absolute_places(kind: str, ngram: bool, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the places that they name made absolute."""
    own, in_front = split_options(kind, ngram, values)
    return draft_options(kind).with_absolute_places(own) | draft_options(LOOKUP).with_absolute_places(in_front)


def _no_such_option(name: str, value: Any, own: Options, in_front: tuple[str, ...], kind: str) -> str:
    serves = [repr(other) for other in DRAFT_KINDS if name in draft_options(other).names]
    if serves:
        or_lookup = " (and of draft.ngram = true)" if repr(LOOKUP) in serves else ""
        return (
            f"draft.options.{name} = {value!r} is an option of kind {' and '.join(serves)}{or_lookup}, but draft.kind "
            f"is {kind!r}: drop one of them"
        )
    hint = did_you_mean(name, (*own.names, *in_front)) or " It has no options."
    return f"draft.options.{name}: {own.of} has no option {name!r}.{hint}"
