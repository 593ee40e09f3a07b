"""Fingerprints of what a run depends on and does not keep itself, to tell on resuming what has changed."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

# Of a file of weights the beginning, where its header is, and as many parts spread over the rest: training moves all
# weights, and reading gigabytes would hold up every start.
_WHOLE = 16 << 20
_PARTS, _PART = 64, 64 << 10


def fingerprint_file(path: Path) -> dict[str, Any]:
    """Where a file is, its size and a digest: of its whole content up to 16 MiB, beyond that of samples.

    **Raises:**

    `UserError` if it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little") + file.read(_WHOLE))
            beyond = max(0, size - _WHOLE)
            for part in range(_PARTS if beyond else 0):
                file.seek(_WHOLE + max(0, beyond - _PART) * part // (_PARTS - 1))
                digest.update(file.read(_PART))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return {"path": str(path.resolve()), "bytes": size, "digest": digest.hexdigest()}


def changed_inputs(then: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of what is not as it was: of another digest, gone or new."""
    names = dict.fromkeys([*then, *now])
    return [name for name in names if then.get(name, {}).get("digest") != now.get(name, {}).get("digest")]
