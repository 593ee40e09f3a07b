"""What the processes of a run do together before its first step, and how each lets the others know of its end."""

import functools as ft
import hashlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._types import ScoredRollouts
from ..config import RunConfig, RunParts
from ..errors import Stopped, UserError
from ..layout import AbstractProcesses, NotInStepError, OtherProcessError
from ..records import AbstractRunFolder, FollowedRunFolder, RunFolder, flattened, latest_checkpoint
from ..runtime import Memory, package_version
from ._ending import one_line

# Settings of JAX by which the same source becomes another program, or gives other random numbers.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)


@contextmanager
def telling_others(processes: AbstractProcesses) -> Iterator[None]:
    """Around a run: whatever ends it here is told to the other processes, which cannot go on without this one."""
    try:
        yield
    except (OtherProcessError, NotInStepError):
        raise
    except Stopped as stop:
        if stop.at_once:
            processes.fail(f"{stop.number.name} has stopped it at once")
        raise
    except BaseException as error:
        processes.fail(one_line(error))
        raise


@contextmanager
def run_folder(path: Path, resume: bool, processes: AbstractProcesses) -> Iterator[AbstractRunFolder]:
    """The run's folder, to which the first process writes.

    **Raises:**

    `UserError` as `RunFolder`, and where a process does not see the folder that the first one has opened.
    """
    if processes.is_first:
        with RunFolder(path, resume) as folder:
            _seen_by_all(path, processes)
            yield folder
    else:
        _seen_by_all(path, processes)
        with FollowedRunFolder(path) as folder:
            yield folder


def _seen_by_all(path: Path, processes: AbstractProcesses) -> None:
    if processes.count == 1:
        return
    mark = path / f".tmp-seen-{secrets.token_hex(4)}"
    if processes.is_first:
        mark.touch()
    try:
        (name, *_) = processes.exchange("the run folder is open", mark.name.encode())
        phase = "the run folder is seen"
        if not (path / name.decode()).exists():
            message = (
                f"the run folder {path} that process 0 has opened is not seen here: give one by --out that is on a "
                "file system which all processes share"
            )
            processes.exchange(phase, b"", error=message)
            raise UserError(message)
        processes.exchange(phase, b"")
    finally:
        if processes.is_first:
            mark.unlink(missing_ok=True)


def check_alike(
    processes: AbstractProcesses, config: RunConfig, inputs: Mapping[str, Mapping[str, Any]], folder: AbstractRunFolder
) -> None:
    """Compares what all processes have to have alike: each computes the same steps by itself where it can.

    **Arguments:**

    - `inputs`: see [`run_inputs`][].

    **Raises:**

    `UserError` where a process would have nothing to do. `NotInStepError` with the keys of the configuration, inputs,
    versions, settings of JAX or kinds of devices that differ.
    """
    prompts = config.grpo.prompts_per_step
    if prompts < processes.count:
        raise UserError(
            f"grpo.prompts_per_step = {prompts}, but there are {processes.count} processes, each of which decodes "
            "prompts of its own: give at least as many"
        )
    if processes.count == 1:
        return
    checkpoint = latest_checkpoint(folder.path)
    settings = flattened(config.model_dump(mode="json"))
    settings.pop("out", None)  # the same folder may be at another place on another machine
    processes.agree(
        "the start",
        {
            **settings,
            **{f"input {name}": about.get("digest") for name, about in inputs.items()},
            **{name: str(jax.config.values.get(name)) for name in _SETTINGS},
            "jax": jax.__version__,
            "eqx_specgrpo": package_version(),
            "source": _source_digest(),
            "devices": sorted({f"{one.platform} {one.device_kind}" for one in jax.local_devices()}),
            "devices of a process": jax.local_device_count(),
            "checkpoint": None if checkpoint is None else checkpoint.name,
        },
    )


def check_own_devices(parts: RunParts) -> None:
    """Raises `UserError` where a process has no whole copy of the weights on its own devices to decode with."""
    if not parts.mesh.for_rollouts().is_addressable:
        raise UserError(
            f"devices.model = {parts.config.devices.model} divides a copy of the weights over devices of several "
            "processes, but each process decodes prompts of its own: set it to at most the devices that one process has"
        )


@ft.cache
def _source_digest() -> str:
    """Of this package: processes with different versions of a function would meet in different programs."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def least_memory(processes: AbstractProcesses, own: Memory | None) -> Memory | None:
    """That of the process which has least, so that all plan alike; `None` if one does not know."""
    found = processes.gather("memory at the start", None if own is None else list(own))
    if None in found:
        return None
    return Memory(min(one[0] for one in found), min(one[1] for one in found), any(one[2] for one in found))


def step_fingerprint(step: int, position: int, scored: ScoredRollouts) -> dict[str, Any]:
    """What all processes have to have alike before a step's update, in which their devices compute together."""
    rollouts = scored.rollouts
    arrays = (rollouts.tokens, rollouts.lengths, scored.rewards, scored.advantages)
    digest = hashlib.blake2b(b"".join(np.ascontiguousarray(one).tobytes() for one in arrays), digest_size=8)
    return {
        "step": step,
        "position": position,
        "shapes": [list(np.shape(one)) for one in (rollouts.prompts.tokens, *arrays)],
        "rollouts": digest.hexdigest(),
    }
