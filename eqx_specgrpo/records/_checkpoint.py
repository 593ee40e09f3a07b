"""Checkpoints of a run: everything that resuming needs, written aside and renamed, so that a kill leaves a whole one.

`checkpoints/step-000003` is the state after three steps: one safetensors file a named PyTree, and `meta.json`, which
is written last and says what belongs to it. Of several processes each writes what its devices have into files of its
own (`policy.1.safetensors`); `meta.json` says which parts make up an array, so that any number of processes and devices
reads it.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from ..errors import CheckpointError, UserError
from ..files import PieceReader, StoredArray, StoredPiece, own_pieces, write_tensor_file
from ..layout import AbstractProcesses, OneProcess
from ..models import with_grouped_outputs
from ..runtime import package_version
from ._old_checkpoint import old_arrays

_STEP = re.compile(r"step-(\d{6,})")
_REPLACED = re.compile(r"\.replaced-step-(\d{6,})")
# 1: a file a tree, and the outputs of layers that one product computes lie one after the other; 2: pieces, in groups.
_FORMAT = 2


def save_checkpoint(
    run_folder: Path,
    step: int,
    trees: Mapping[str, PyTree],
    meta: Mapping[str, Any],
    keep: int | None = 2,
    processes: AbstractProcesses | None = None,
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
    - `processes`: of the run, all of which call this together.

    **Returns:**

    The checkpoint's folder.

    **Raises:**

    `UserError` where the disk is full or not writable, in this process or another. The earlier checkpoints are as they
    were.
    """
    processes = OneProcess() if processes is None else processes
    root = run_folder / "checkpoints"
    name = f"step-{step:06d}"
    aside, phase = root / f".tmp-{name}", f"checkpoint of step {step}"
    try:
        with _told(processes, f"{phase}: begun", run_folder, step):
            if processes.is_first:
                root.mkdir(parents=True, exist_ok=True)
                _tidy(root)
                aside.mkdir()
        processes.exchange(f"{phase}: begun", b"")
        with _told(processes, f"{phase}: written", run_folder, step):
            own = {name: _write_pieces(aside, name, tree, processes) for name, tree in trees.items()}
            _sync_folder(aside)
        parts = processes.gather(f"{phase}: written", own)
        with _told(processes, f"{phase}: whole", run_folder, step):
            if processes.is_first:
                _commit(aside, root / name, step, {name: _joined(name, parts) for name in trees}, meta)
        processes.exchange(f"{phase}: whole", b"")
    except BaseException:
        if processes.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if processes.is_first:
        _prune(root, step, keep)
    return root / name


@contextmanager
def _told(processes: AbstractProcesses, phase: str, run_folder: Path, step: int) -> Iterator[None]:
    """Around a part of saving: what the system says of the disk is an error in all processes."""
    try:
        yield
    except OSError as error:
        whole = latest_checkpoint(run_folder)
        kept = f"nothing saved before is lost, {whole} is whole" if whole else "there was no earlier checkpoint"
        message = (
            f"the checkpoint of step {step} could not be written to {run_folder / 'checkpoints'}: {_reason(error)}; "
            f"{kept}. Make room there, then run again with --resume"
        )
        processes.exchange(phase, b"", error=message)
        raise UserError(message) from error


def _write_pieces(folder: Path, name: str, tree: PyTree, processes: AbstractProcesses) -> dict[str, Any]:
    """Writes what this process has of a tree; where each part of its arrays is, as `meta.json` says it."""
    pieces = own_pieces(tree, is_first=processes.is_first)
    if not pieces and not processes.is_first:
        return {}
    file = f"{name}.safetensors" if processes.is_first else f"{name}.{processes.index}.safetensors"
    checksums = write_tensor_file(folder / file, [piece.tensor for piece in pieces])
    arrays: dict[str, Any] = {}
    for piece in pieces:
        about = arrays.setdefault(
            piece.of, {"dtype": piece.tensor.dtype.name, "shape": list(piece.shape), "pieces": []}
        )
        place = {"file": file, "name": piece.tensor.name, "start": list(piece.start)}
        about["pieces"].append(place | {"crc32": checksums[piece.tensor.name]})
    return arrays


def _joined(name: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all processes have of a tree."""
    arrays: dict[str, Any] = {}
    for part in parts:
        for array, about in part[name].items():
            if array in arrays:
                arrays[array]["pieces"] += about["pieces"]
            else:
                arrays[array] = dict(about)
    return arrays


def _commit(aside: Path, final: Path, step: int, trees: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Says what belongs to the checkpoint, and puts it in place."""
    about = {
        "format": _FORMAT,
        "step": step,
        "jax": jax.__version__,
        "eqx_specgrpo": package_version(),
        "trees": trees,
        "meta": dict(meta),
    }
    with open(aside / "meta.json", "w", encoding="utf-8") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(aside)
    if final.exists():
        os.rename(final, final.with_name(f".replaced-{final.name}"))
    os.rename(aside, final)
    _sync_folder(final.parent)


def latest_checkpoint(run_folder: Path) -> Path | None:
    """Returns the checkpoint with the most steps done, or `None` if there is none. Incomplete ones, which a kill may
    leave behind, never count."""
    found = _checkpoints(run_folder / "checkpoints")
    return found[max(found)] if found else None


def checkpointed_steps(run_folder: Path) -> int:
    """Returns the number of steps done in the [`latest_checkpoint`][]; 0 if there is none."""
    return max(_checkpoints(run_folder / "checkpoints"), default=0)


def load_checkpoint(folder: Path, templates: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Reads named PyTrees of a checkpoint, whichever processes and devices wrote it.

    **Arguments:**

    - `folder`: as [`latest_checkpoint`][] returns it.
    - `templates`: for each tree that is wanted, one of the same structure, shapes and dtypes; its arrays are replaced,
        and are on the same devices.

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
    if version not in (1, _FORMAT):
        raise CheckpointError(
            f"{folder} is in format {version}, this version of eqx_specgrpo reads 1 and {_FORMAT}: update it"
        )
    trees, way_out = {}, _way_out(folder)
    reader = PieceReader(folder, way_out)
    for name, template in templates.items():
        if name not in summaries:
            raise CheckpointError(f"{folder} holds no {name!r}, only {', '.join(summaries)}. {way_out}")
        path = folder / f"{name}.safetensors"
        if version == 1:
            arrays = old_arrays(path, summaries[name]["crc32"], way_out)
        else:
            arrays = {array: _stored(about) for array, about in summaries[name].items()}
        tree = reader.read_tree(path, template, arrays)
        trees[name] = with_grouped_outputs(tree) if version == 1 else tree
    return trees, {**meta, "step": step}


def _stored(about: Mapping[str, Any]) -> StoredArray:
    pieces = [
        StoredPiece(piece["file"], piece["name"], tuple(piece["start"]), piece["crc32"]) for piece in about["pieces"]
    ]
    return StoredArray(about["dtype"], tuple(about["shape"]), pieces)


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
