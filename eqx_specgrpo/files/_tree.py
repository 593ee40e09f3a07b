"""One PyTree, one safetensors file: its arrays under the names of their places, bit for bit."""

import zlib
from pathlib import Path
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError


def named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a PyTree on the host, by their places in it, as in `layers.0.weight`.

    JAX and numpy arrays are arrays; a typed PRNG key is its `uint32` data. Everything else is left out: it is
    structure, which a template supplies.
    """
    named = {}
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if not is_array(leaf):
            continue
        name = array_name(path)
        if name in named:
            raise ValueError(f"two arrays of this PyTree are both called {name!r}: rename a dictionary key")
        named[name] = _to_host(leaf)
    return named


def read_tree(path: Path, template: PyTree, way_out: str) -> tuple[PyTree, int]:
    """`template` with its arrays replaced by those of the file, and the CRC-32 of their bytes in order of their names.

    **Arguments:**

    - `path`: a safetensors file of exactly the arrays of `template`.
    - `template`: gives structure, shapes, dtypes, and whether an array is numpy's, a PRNG key or weakly typed.
    - `way_out`: a sentence that ends each error.

    **Raises:**

    `CheckpointError` if the file cannot be read, or holds other arrays; it names them.
    """
    leaves, treedef = jtu.tree_flatten_with_path(template)
    wanted = {array_name(place): leaf for place, leaf in leaves if is_array(leaf)}
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            check_names(path, names, set(wanted), way_out)
            found = {}
            checksum = 0
            for name in sorted(names):
                value = file.get_tensor(name)
                check_shape(path, name, value, wanted[name], way_out)
                checksum = zlib.crc32(value.tobytes(), checksum)
                found[name] = like(wanted[name], value)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. {way_out}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}). {way_out}") from error
    return treedef.unflatten([found[array_name(place)] if is_array(leaf) else leaf for place, leaf in leaves]), checksum


def is_array(leaf: Any) -> bool:
    """Whether it is kept: arrays of JAX and numpy, and numpy's scalars."""
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)


def is_key(leaf: Any) -> TypeGuard[jax.Array]:
    """Whether it is a typed PRNG key."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def array_name(path: tuple[Any, ...]) -> str:
    """Of an array, by its place in a PyTree."""
    return jtu.keystr(path, simple=True, separator=".") or "value"


def _to_host(leaf: Any) -> np.ndarray:
    # Not `ascontiguousarray`, which makes scalars one-dimensional.
    return np.asarray(jr.key_data(leaf) if is_key(leaf) else leaf, order="C")


def like(leaf: Any, value: np.ndarray) -> Any:
    """What was stored, as the kind of array that the template has."""
    if isinstance(leaf, np.ndarray):
        return value
    if isinstance(leaf, np.generic):
        return value[()]
    if is_key(leaf):
        return jr.wrap_key_data(jnp.array(value), impl=jr.key_impl(leaf))
    # A weakly typed array must come back as one, else what follows promotes (and compiles) differently.
    return leaf.at[...].set(value) if leaf.weak_type else jnp.array(value)


def check_names(path: Path, found: set[str], wanted: set[str], way_out: str) -> None:
    """Raises `CheckpointError` if other tensors are there than were wanted; it names them."""
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    if missing or unexpected:
        lists = [f"{word} {_few(names)}" for word, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise CheckpointError(f"{path} holds other tensors than were expected: {'; '.join(lists)}. {way_out}")


def check_shape(path: Path, name: str, found: Any, leaf: Any, way_out: str) -> None:
    """Raises `CheckpointError` if what was found, which has a shape and a dtype, is not as the template's array."""
    expected = stored_struct(leaf)
    if tuple(found.shape) != tuple(expected.shape) or np.dtype(found.dtype) != np.dtype(expected.dtype):
        raise CheckpointError(
            f"{path}: tensor {name} is {found.dtype}{list(found.shape)}, this run needs "
            f"{expected.dtype}{list(expected.shape)}. {way_out}"
        )


def stored_struct(leaf: Any) -> Any:
    """Has the shape and dtype in which an array is stored; of a typed PRNG key those of its data."""
    return jax.eval_shape(jr.key_data, leaf) if is_key(leaf) else leaf


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
