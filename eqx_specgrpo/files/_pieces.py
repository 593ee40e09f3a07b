"""A PyTree in files by pieces: what each process has of its arrays, and arrays made of them for any other division."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ._host import on_host
from ._tensor_file import TensorToWrite
from ._tree import array_name, check_names, check_shape, is_array, is_key, like, stored_struct

Index = tuple[slice, ...]


class Piece(NamedTuple):
    """A part of an array, or all of it.

    **Arguments:**

    - `of`: the array's place in its PyTree, as in `layers.0.weight`.
    - `shape`: of the whole array.
    - `start`: where the part begins along each axis.
    - `tensor`: the part.
    """

    of: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    tensor: TensorToWrite


def own_pieces(tree: PyTree, *, is_first: bool) -> list[Piece]:
    """What this process is to write of the arrays of a PyTree, so that all processes together write each number once.

    Arrays on the devices of several processes are written by all of them, each its own part. What a process has whole
    is written by the first one.

    **Arguments:**

    - `is_first`: whether this is the first process.
    """
    pieces, names = [], set()
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if not is_array(leaf):
            continue
        name = array_name(path)
        if name in names:
            raise ValueError(f"two arrays of this PyTree are both called {name!r}: rename a dictionary key")
        names.add(name)
        pieces += _own_pieces(name, leaf, is_first)
    return pieces


def _own_pieces(name: str, leaf: Any, is_first: bool) -> Iterator[Piece]:
    struct = stored_struct(leaf)
    shape, dtype = tuple(struct.shape), np.dtype(struct.dtype)
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        if is_first:
            tensor = TensorToWrite(name, dtype, shape, lambda: on_host(jr.key_data(leaf) if is_key(leaf) else leaf))
            yield Piece(name, shape, (0,) * len(shape), tensor)
        return
    data = jr.key_data(leaf) if is_key(leaf) else leaf
    for shard in data.addressable_shards:
        if shard.replica_id == 0:
            index = bounds_of(shard.index, shape)
            sizes = tuple(stop - start for start, stop in index)
            where = ",".join(f"{start}:{stop}" for start, stop in index)
            tensor = TensorToWrite(f"{name}[{where}]", dtype, sizes, lambda shard=shard: on_host(shard.data))
            yield Piece(name, shape, tuple(start for start, _ in index), tensor)


class StoredPiece(NamedTuple):
    """A part of an array in a file.

    **Arguments:**

    - `file`, `name`: which tensor of which file.
    - `start`: where it begins in the array.
    - `checksum`: CRC-32 of its bytes; `None` if it is not known.
    """

    file: str
    name: str
    start: tuple[int, ...]
    checksum: int | None


class StoredArray(NamedTuple):
    """An array in files.

    **Arguments:**

    - `dtype`, `shape`: of the whole.
    - `pieces`: which make it up.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[StoredPiece]


class PieceReader:
    """Reads arrays, or any part of them, from the files of a folder.

    **Arguments:**

    - `folder`: of the files.
    - `way_out`: a sentence that ends each error.
    """

    def __init__(self, folder: Path, way_out: str):
        self._folder, self._way_out = folder, way_out
        self._files: dict[str, Any] = {}

    def read_tree(self, path: Path, template: PyTree, arrays: Mapping[str, StoredArray]) -> PyTree:
        """`template` with its arrays replaced, each divided over devices as the template's is: of an array on several
        devices only this process's parts are read, one at a time.

        **Arguments:**

        - `path`: what the arrays are of, for messages.
        - `template`: gives structure, shapes, dtypes and devices.
        - `arrays`: where each is.

        **Raises:**

        `CheckpointError` if a file cannot be read, is damaged, or the arrays are others than the template's.
        """
        leaves, treedef = jtu.tree_flatten_with_path(template)
        wanted = {array_name(place): leaf for place, leaf in leaves if is_array(leaf)}
        check_names(path, set(arrays), set(wanted), self._way_out)
        found = {}
        for name, leaf in sorted(wanted.items()):
            stored = arrays[name]
            check_shape(path, name, stored, leaf, self._way_out)
            found[name] = self._array(name, leaf, stored)
        return treedef.unflatten([found[array_name(place)] if is_array(leaf) else leaf for place, leaf in leaves])

    def _array(self, name: str, leaf: Any, stored: StoredArray) -> Any:
        if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
            return like(leaf, self.read(name, stored, tuple(slice(0, size) for size in stored.shape)))
        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def part(index: Index | None) -> np.ndarray:
            assert index is not None
            bounds = bounds_of(index, stored.shape)
            if bounds not in parts:  # copies of a part are on several devices
                parts[bounds] = self.read(name, stored, tuple(slice(*bound) for bound in bounds))
            return parts[bounds]

        if is_key(leaf):
            whole = self.read(name, stored, tuple(slice(0, size) for size in stored.shape))
            return jax.device_put(like(leaf, whole), leaf.sharding)
        return jax.make_array_from_callback(stored.shape, leaf.sharding, part)

    def read(self, name: str, stored: StoredArray, index: Index) -> np.ndarray:
        """A part of an array."""
        wanted = bounds_of(index, stored.shape)
        part, filled = None, 0
        for piece in stored.pieces:
            sizes = self._sizes(piece)
            there = [(start, start + size) for start, size in zip(piece.start, sizes, strict=True)]
            if there == list(wanted):
                return self._tensor(piece)
            overlap = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, there, strict=True)]
            if any(begin >= end for begin, end in overlap):
                continue
            tensor = self._tensor(piece)
            if part is None:
                part = np.empty([end - begin for begin, end in wanted], tensor.dtype)
            part[_within(overlap, wanted)] = tensor[_within(overlap, there)]
            filled += int(np.prod([end - begin for begin, end in overlap]))
        if part is None or filled != part.size:
            raise CheckpointError(f"{self._folder} lacks parts of tensor {name}. {self._way_out}")
        return part

    def _file(self, name: str) -> Any:
        path = self._folder / name
        if name not in self._files:
            try:
                self._files[name] = safe_open(path, framework="numpy")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing. {self._way_out}") from None
            except (SafetensorError, OSError) as error:
                raise self._unreadable(name, error) from error
        return self._files[name]

    def _unreadable(self, file: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self._folder / file} is truncated or corrupt ({error}). {self._way_out}")

    def _sizes(self, piece: StoredPiece) -> tuple[int, ...]:
        try:
            return tuple(self._file(piece.file).get_slice(piece.name).get_shape())
        except SafetensorError as error:
            raise self._unreadable(piece.file, error) from error

    def _tensor(self, piece: StoredPiece) -> np.ndarray:
        try:
            tensor = self._file(piece.file).get_tensor(piece.name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(piece.file, error) from error
        content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
        if piece.checksum is not None and zlib.crc32(content) != piece.checksum:
            raise CheckpointError(
                f"{self._folder / piece.file} is corrupt: the contents of {piece.name} do not match the checksum they "
                f"were saved with. {self._way_out}"
            )
        return tensor


def bounds_of(index: Index, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Where a part of an array begins and ends along each axis."""
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _within(part: Sequence[tuple[int, int]], whole: Sequence[tuple[int, int]]) -> Index:
    return tuple(slice(begin - first, end - first) for (begin, end), (first, _) in zip(part, whole, strict=True))
