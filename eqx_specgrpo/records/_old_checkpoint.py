"""Checkpoints of format 1: one file a PyTree, with one checksum for all of it."""

import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import StoredArray, StoredPiece


def old_arrays(path: Path, checksum: int, way_out: str) -> dict[str, StoredArray]:
    """Where the arrays of a file are, once its checksum is found right: the CRC-32 of their bytes in order of their
    names.

    **Raises:**

    `CheckpointError` if it is not, or the file cannot be read.
    """
    found, arrays = 0, {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                found = zlib.crc32(tensor.tobytes(), found)
                piece = StoredPiece(path.name, name, (0,) * tensor.ndim, None)
                arrays[name] = StoredArray(tensor.dtype.name, tensor.shape, [piece])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. {way_out}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}). {way_out}") from error
    if found != checksum:
        raise CheckpointError(
            f"{path} is corrupt: its contents do not match the checksum they were saved with. {way_out}"
        )
    return arrays
