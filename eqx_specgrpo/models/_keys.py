"""What becomes of the keys of a checkpoint's files: each is read, harmless or refused, by a table.

A key that changes what is computed, and is not read, gives a model or a tokenizer that is wrong without a word. So no
key is passed over: `_config_keys`, `_tokenizer_keys` and `_gguf_keys` say of every key that the supported families
write what becomes of it, and why. What no table knows is a warning that names the key: most often it merely describes.
"""

import dataclasses
import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError


class CheckpointWarning(UserWarning):
    """Something in a checkpoint's files that may matter, and that this library does not know or does not follow."""


@dataclasses.dataclass(frozen=True)
class KeyRule:
    """What becomes of some keys of one file.

    **Arguments:**

    - `names`: of the keys. One with a `*` stands for all that begin and end like it.
    - `treatment`: `"read"`, `"harmless"` (nothing that is computed here depends on it) or `"refused"`.
    - `why`: for `docs/checkpoints.md`, and for the error where a key is refused.
    - `neutral`: the values at which a key that is not read changes nothing, and is passed over.
    - `families`: of those that read the key, where not all do; for the others it is refused.
    """

    names: tuple[str, ...]
    treatment: Literal["read", "harmless", "refused"]
    why: str
    neutral: tuple[Any, ...] = (None, False)
    families: tuple[str, ...] = ()

    def covers(self, key: str) -> bool:
        """Whether the rule is about this key."""
        return any(fnmatch.fnmatchcase(key, name) for name in self.names)

    def refuses(self, value: Any, family: str) -> bool:
        """Whether a checkpoint of that family with this value can't be loaded."""
        if self.treatment == "harmless" or (self.treatment == "read" and family in (self.families or (family,))):
            return False
        return not (_empty(value) or any(value == neutral for neutral in self.neutral))


def read(why: str, *names: str, families: Sequence[str] = (), neutral: tuple[Any, ...] = (None, False)) -> KeyRule:
    """Keys that are read: by all families, or by those named and then refused for the others."""
    return KeyRule(names, "read", why, neutral, tuple(families))


def harmless(why: str, *names: str) -> KeyRule:
    """Keys on which nothing depends that is computed here."""
    return KeyRule(names, "harmless", why)


def refused(why: str, *names: str, neutral: tuple[Any, ...] = (None, False)) -> KeyRule:
    """Keys that change what is computed, in a way that is not supported."""
    return KeyRule(names, "refused", why, neutral)


def rule_of(key: str, table: Sequence[KeyRule]) -> KeyRule | None:
    """The rule for a key; exact names come before those with a `*`."""
    exact = (rule for rule in table if key in rule.names)
    return next(exact, next((rule for rule in table if rule.covers(key)), None))


def check_keys(values: Mapping[str, Any], table: Sequence[KeyRule], origin: Path | str, family: str = "") -> None:
    """Passes over what is read or harmless.

    **Raises:**

    `CheckpointError` for a key that is refused. A key that is in no rule, and not empty, gives a `CheckpointWarning`.
    """
    unknown = []
    for key, value in values.items():
        rule = rule_of(key, table)
        if rule is None:
            if not (_empty(value) or value is False):
                unknown.append(f"{key!r} ({_short(value)})")
        elif rule.refuses(value, family):
            why = rule.why if rule.treatment == "refused" else f"{family} has no such option"
            raise CheckpointError(
                f"{origin}: {key!r} is {_short(value)}, which is not supported: {why}. Delete the key if you know that "
                "the model was trained without it"
            )
    if unknown:
        warnings.warn(
            f"{origin}: this library does not know {', '.join(unknown)}, and goes on without. If it changes what the "
            "model computes or how text is split, the results here are wrong: compare with the program that wrote it",
            CheckpointWarning,
            stacklevel=2,
        )


def check_files(folder: Path, table: Sequence[KeyRule]) -> None:
    """Raises a `CheckpointError` for a file whose meaning is not supported. Other files may be anything."""
    for rule in table:
        for name in rule.names if rule.treatment == "refused" else ():
            if (folder / name).exists():
                raise CheckpointError(f"{folder} has {name}, which is not supported: {rule.why}")


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
