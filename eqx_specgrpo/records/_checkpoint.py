"""Checkpoints of a run: everything that resuming needs, written aside and renamed, so that a kill leaves a whole one.

`checkpoints/step-000003` is the state after three steps: one safetensors file a named PyTree, and `meta.json`, which
is written last and says what belongs to it.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..errors import CheckpointError, UserError
from ..files import named_arrays, read_tree
from ..runtime import package_version

_STEP = re.compile(r"step-(\d{6,})")
_REPLACED = re.compile(r"\.replaced-step-(\d{6,})")
_FORMAT = 1


def save_checkpoint(
    run_folder: Path, step: int, trees: Mapping[str, PyTree], meta: Mapping[str, Any], keep: int | None = 2
) -> Path:
    """Writes `checkpoints/step-NNNNNN` of a run folder; a checkpoint of the same step is replaced.

    At any instant there is a whole checkpoint, the new one or an earlier one: the files are written and flushed to the
    disk in a folder aside, that is renamed, and only then is anything older removed.

    **Arguments:**

    - `run_folder`: the run's folder; `checkpoints/` is made in it.
    - `step`: how many steps have been done.
    - `trees`: PyTrees by name. Their arrays are kept bit for bit, PRNG keys included; all else is the template's.
    - `meta`: what else resuming needs, as JSON can hold it.
    - `keep`: how many checkpoints are left in place, this one included; `None`: all.

    **Returns:**

    The checkpoint's folder.

    **Raises:**

    `UserError` where the disk is full or not writable. The earlier checkpoints are as they were.
    """
    root = run_folder / "checkpoints"
    name = f"step-{step:06d}"
    aside = root / f".tmp-{name}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        aside.mkdir()
        summaries = {tree_name: _write_tree(aside, tree_name, tree) for tree_name, tree in trees.items()}
        about = {
            "format": _FORMAT,
            "step": step,
            "jax": jax.__version__,
            "eqx_specgrpo": package_version(),
            "trees": summaries,
            "meta": dict(meta),
        }
        with open(aside / "meta.json", "w", encoding="utf-8") as file:
            json.dump(about, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(aside)
        final = root / name
        if final.exists():
            os.rename(final, root / f".replaced-{name}")
        os.rename(aside, final)
        _sync_folder(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        whole = latest_checkpoint(run_folder)
        kept = f"nothing saved before is lost, {whole} is whole" if whole else "there was no earlier checkpoint"
        raise UserError(
            f"the checkpoint of step {step} could not be written to {root}: {_reason(error)}; {kept}. Make room there, "
            "then run again with --resume"
        ) from error
    _prune(root, step, keep)
    return final


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint with most steps done, or `None` if there is none. What a kill left half-written never counts."""
    found = _checkpoints(run_folder / "checkpoints")
    return found[max(found)] if found else None


def checkpointed_steps(run_folder: Path) -> int:
    """How many steps are done in the [`latest_checkpoint`][]; 0 without one."""
    return max(_checkpoints(run_folder / "checkpoints"), default=0)


def load_checkpoint(folder: Path, templates: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Reads named PyTrees of a checkpoint.

    **Arguments:**

    - `folder`: as [`latest_checkpoint`][] returns it.
    - `templates`: for each tree that is wanted, one of the same structure, shapes and dtypes; its arrays are replaced.

    **Returns:**

    The trees by name, and the `meta` they were saved with. `meta["step"]` is always there: the number of steps done.

    **Raises:**

    `CheckpointError` if a file is missing, truncated or corrupt, or does not fit its template; it names the tensors,
    and the checkpoint before this one.
    """
    try:
        about = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        summaries, meta, step = about["trees"], about["meta"], about["step"]
        version = about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'meta.json'} cannot be read: {error}. {_way_out(folder)}") from error
    if version != _FORMAT:
        raise CheckpointError(
            f"{folder} is in format {version}, this version of eqx_specgrpo reads {_FORMAT}: update it"
        )
    trees = {}
    for name, template in templates.items():
        if name not in summaries:
            raise CheckpointError(f"{folder} holds no {name!r}, only {', '.join(summaries)}. {_way_out(folder)}")
        trees[name], checksum = read_tree(folder / f"{name}.safetensors", template, _way_out(folder))
        if checksum != summaries[name]["crc32"]:
            raise CheckpointError(
                f"{folder / name}.safetensors is corrupt: its contents do not match the checksum they were saved with. "
                f"{_way_out(folder)}"
            )
    return trees, {**meta, "step": step}


def _write_tree(folder: Path, name: str, tree: PyTree) -> dict[str, int]:
    arrays = named_arrays(tree)
    path = folder / f"{name}.safetensors"
    save_file(dict(arrays), path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    checksum = 0
    for key in sorted(arrays):
        checksum = zlib.crc32(arrays[key].tobytes(), checksum)
    return {"tensors": len(arrays), "bytes": sum(array.nbytes for array in arrays.values()), "crc32": checksum}


def _sync_folder(folder: Path) -> None:
    # Without this a power cut may undo the rename. Windows cannot open folders, and need not.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some network file systems cannot sync a folder.
            raise
    finally:
        os.close(descriptor)


def _checkpoints(root: Path) -> dict[int, Path]:
    if not root.is_dir():
        return {}
    # A checkpoint that was being replaced counts as long as its successor isn't in place.
    found = {}
    for pattern in (_REPLACED, _STEP):
        for path in root.iterdir():
            match = pattern.fullmatch(path.name)
            if match:
                found[int(match[1])] = path
    return found


def _tidy(root: Path) -> None:
    """Removes what a kill left behind, and puts a checkpoint back that was being replaced."""
    for path in list(root.iterdir()):
        match = _REPLACED.fullmatch(path.name)
        if match and not (root / f"step-{match[1]}").exists():
            os.rename(path, root / f"step-{match[1]}")
        elif match:
            _remove(path)
        elif path.name.startswith(".tmp-"):
            shutil.rmtree(path, ignore_errors=True)


def _prune(root: Path, step: int, keep: int | None) -> None:
    for path in root.iterdir():
        if _REPLACED.fullmatch(path.name):
            _remove(path)
    found = _checkpoints(root)
    for number in sorted(found, reverse=True)[len(found) if keep is None else keep :]:
        if number != step:
            _remove(found[number])


def _remove(path: Path) -> None:
    # Renamed first: a removal that is cut short must not leave half a folder under a checkpoint's name.
    doomed = path.with_name(f".tmp-removed-{path.name}")
    try:
        os.rename(path, doomed)
    except OSError:
        return  # Too much is kept, which is no reason to stop a run.
    shutil.rmtree(doomed, ignore_errors=True)


def _way_out(folder: Path) -> str:
    earlier = _checkpoints(folder.parent)
    match = _STEP.search(folder.name)
    earlier = {step: path for step, path in earlier.items() if match is None or step < int(match[1])}
    if not earlier:
        return "There is no earlier checkpoint: start a new run"
    return f"The checkpoint before it is {earlier[max(earlier)]}: remove {folder} to resume from there"


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
