"""Writing a safetensors file one tensor at a time, so that no more than one is on the host."""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

# What the format calls the dtypes; the reader of the safetensors package knows all of them.
_NAMES = {
    np.dtype(kind): name
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
        "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64,
        "C64": np.complex64,
    }.items()
}  # fmt: skip


class TensorToWrite(NamedTuple):
    """A tensor that is made when it is written.

    **Arguments:**

    - `name`: in the file.
    - `dtype`, `shape`: as it will be stored.
    - `make`: returns it, in any dtype.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Of its numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_tensor_file(
    path: Path, tensors: Iterable[TensorToWrite], metadata: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Writes a safetensors file and flushes it to the disk.

    The safetensors package writes a file from arrays that are all there; its layout, a header of offsets and the
    numbers one behind the other, allows for one at a time (https://github.com/huggingface/safetensors, "Format").

    **Arguments:**

    - `tensors`: made and written in turn, the widest dtypes first, so that each is aligned.
    - `metadata`: of the file.

    **Returns:**

    The CRC-32 of each tensor's bytes, by name.

    **Raises:**

    `OSError` if it cannot be written. `ValueError` if two have one name, a dtype has none in the format, or what was
    made has another shape.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in ordered:
        if tensor.name in header:
            raise ValueError(f"two tensors of {path.name} are both called {tensor.name!r}")
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {tensor.name!r} is of {tensor.dtype}, which safetensors cannot hold")
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            array = tensor.make()
            if array.shape != tensor.shape:
                raise ValueError(f"tensor {tensor.name!r} has the shape {array.shape}, not {tensor.shape}")
            # Not `ascontiguousarray` alone, which makes scalars one-dimensional; bytes, whatever the dtype.
            content = np.ascontiguousarray(array, tensor.dtype).reshape(-1).view(np.uint8).data
            checksums[tensor.name] = zlib.crc32(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return checksums
