"""From the names of things to their descriptions."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

Description = TypeVar("Description")


def described(
    package: str, names: Mapping[str, str], constant: str, kind: type[Description]
) -> Mapping[str, Description]:
    """The description that stands at the end of each file.

    **Arguments:**

    - `package`: of the files.
    - `names`: each name, and its file.
    - `constant`: what the description is called there.
    - `kind`: of the descriptions.
    """
    found = {}
    for name, file in names.items():
        description = vars(importlib.import_module(f".{file}", package)).get(constant)
        if not isinstance(description, kind):
            raise TypeError(
                f"{package}.{file} is named as {name!r}: it must end with {constant} = {kind.__name__}(...)"
            )
        found[name] = description
    return MappingProxyType(found)
