"""Stored tensors by name: where they are read from and written to, without knowing what they mean."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import TensorToWrite, write_tensor_file

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),  # Importing ml_dtypes is also what teaches safetensors' reader this dtype.
}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read.

    **Arguments:**

    - `shape`: known from the header.
    - `read`: returns the array, in the dtype it is stored in (float32 if it was quantized).
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a `CheckpointError` that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as JSON ({error}); download or copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}, but should hold an object")
    return values


def listing(names: list[str]) -> str:
    """Up to five names, and the count of the rest."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists."""
    if (folder / _SINGLE).is_file():
        return _file_tensors(folder / _SINGLE)
    if (folder / _INDEX).is_file():
        return _sharded_tensors(folder)
    present = sorted(path.name for path in folder.iterdir())
    gguf = [name for name in present if name.endswith(".gguf")]
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth"))]
    hint = "is the download complete?"
    if gguf:
        hint = f"to load a .gguf file, give its own path: {folder / gguf[0]}"
    elif pickles:
        hint = f"{pickles[0]} is a pickle, which can run code, so it is never read: convert it to safetensors"
    raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}; {hint}")


def _file_tensors(path: Path) -> dict[str, StoredTensor]:
    try:
        # The handle maps the file into memory and checks that header and length agree; tensors are copied out one at a
        # time.
        handle = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); download or copy it again") from error

    def stored(name: str) -> StoredTensor:
        header = handle.get_slice(name)
        if header.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {header.get_dtype()}; supported are {', '.join(_DTYPES)}: use an "
                "unquantized checkpoint"
            )
        return StoredTensor(tuple(header.get_shape()), lambda: handle.get_tensor(name))

    return {name: stored(name) for name in handle.keys()}


def _sharded_tensors(folder: Path) -> dict[str, StoredTensor]:
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to file names; download it again")
    files = sorted(set(weight_map.values()))
    # A shard is a file beside its index; anything else is a mistake or mischief.
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} points outside its folder: {listing(outside)}")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} lists {len(files)} files, of which {len(missing)} missing: {listing(missing)}; download the rest"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors.update(_file_tensors(folder / name))
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise CheckpointError(f"{index} lists {len(absent)} tensors that its files lack: {listing(absent)}")
    return tensors


def write_tensors(tensors: Sequence[TensorToWrite], folder: Path, shard_bytes: int) -> None:
    """Writes `model.safetensors`, or shards with an index where that would exceed `shard_bytes`; one tensor at a time
    is on the host."""
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensor_file(folder / file, shard, {"format": "pt"})
        weight_map.update({tensor.name: file for tensor in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
