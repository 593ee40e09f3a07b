"""How the processes of a run find one another: Slurm's or Open MPI's environment, or what the command line says."""

import atexit
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name

from ..errors import UserError
from ._coordinated import PATIENCE, AbstractStore, ManyProcesses
from ._processes import AbstractProcesses, OneProcess

_LINGER = 40  # seconds that the coordination service outlives the first process, so that the others can learn of it
_START = 300  # seconds that processes wait for one another at the start
_PORTS = 65535 - 2**12 + 1  # from here on, one for each job of a scheduler


@dataclass(frozen=True)
class ProcessPlace:
    """Which process of a run this is, and where the processes meet.

    **Arguments:**

    - `coordinator`: `host:port` of the first process.
    - `index`, `count`: which one this is, and how many there are.
    - `of_machine`: which one of its machine's it is, and how many of them the machine has; `None` if that is not known.
    """

    coordinator: str
    index: int
    count: int
    of_machine: tuple[int, int] | None = None


def process_place(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    index: int | None = None,
    count: int | None = None,
) -> ProcessPlace | None:
    """Where this process is among those of a run; `None` where it is the only one.

    **Arguments:**

    - `environment`: of the program, in which `srun` and `mpirun` (Open MPI) say what is not given here.
    - `coordinator`, `index`, `count`: of the command line.

    **Raises:**

    `UserError` if something is missing, or does not fit.
    """
    found = _of_slurm(environment) or _of_open_mpi(environment)
    if found is None and (index is None) != (count is None):
        missing = "--processes" if count is None else "--process"
        raise UserError(f"{missing} is missing: --coordinator HOST:PORT --process I --processes N belong together")
    index = found.index if index is None and found is not None else index
    count = found.count if count is None and found is not None else count
    if coordinator is None and count in (None, 1):
        return None
    if coordinator is not None and (index is None or count is None):
        raise UserError(
            f"--coordinator {coordinator}, but neither srun nor mpirun says which process this is: give --process I "
            "and --processes N as well"
        )
    assert index is not None and count is not None
    if not 0 <= index < count:
        raise UserError(f"--process is {index} of {count}: processes are counted from 0 to {count - 1}")
    coordinator = coordinator or (found.coordinator if found is not None else "")
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        given = f"--coordinator is {coordinator!r}" if coordinator else "it is not known where the processes meet"
        raise UserError(f"{given}: give --coordinator HOST:PORT, a host of the first process and a free port there")
    return ProcessPlace(coordinator, index, count, None if found is None else found.of_machine)


def _of_slurm(environment: Mapping[str, str]) -> ProcessPlace | None:
    """Of a task of `srun`; a batch script's own environment has no step."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    if any(name not in environment for name in names):
        return None
    count, index, local, nodes, job = (environment[name] for name in names)
    # "a1", "a1,b2", "a[1-3,7],b2": the first host.
    match = re.match(r"([^,\[]+)(?:\[([^-,\]]+))?", nodes)
    host = "" if match is None else match[1] + (match[2] or "")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # as "2(x3),1", one entry for equal neighbours
    most = max(int(number) for number in re.findall(r"(?:^|,)(\d+)", tasks) or ["1"])
    return ProcessPlace(f"{host}:{_PORTS + int(job) % 2**12}", int(index), int(count), (int(local), most))


def _of_open_mpi(environment: Mapping[str, str]) -> ProcessPlace | None:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    if any(name not in environment for name in names):
        return None
    count, index, local, local_count = (int(environment[name]) for name in names)
    # On one machine any port will do that the processes agree on; of several it is not told where the first one is.
    launcher = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or "0"
    port = _PORTS + sum(map(ord, launcher)) % 2**12
    return ProcessPlace(f"localhost:{port}" if local_count == count else "", index, count, (local, local_count))


class _CoordinationStore(AbstractStore):
    """The store of JAX's coordination service."""

    def __init__(self, client: Any):
        self._client = client

    def set(self, key, value, *, replace=False):
        self._client.key_value_set_bytes(key, value, allow_overwrite=replace)

    def get(self, key, seconds):
        try:
            return self._client.blocking_key_value_get_bytes(key, int(1000 * seconds))
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def under(self, prefix):
        return {key.removeprefix(prefix): value for key, value in self._client.key_value_dir_get_bytes(prefix)}

    def remove(self, key):
        self._client.key_value_delete(key)


def join_processes(
    place: ProcessPlace | None, *, patience: float = PATIENCE, environment: Mapping[str, str] | None = None
) -> AbstractProcesses:
    """Begins `jax.distributed` and waits for all processes. To be called before JAX is asked for devices.

    The coordination service has a process of its own, which the first process starts and which outlives it for a while.
    Within the first process it would end with it, and JAX ends every other process at once then, without a word.

    **Arguments:**

    - `place`: see [`eqx_specgrpo.layout.process_place`][].
    - `patience`: seconds without a sign of life after which a process counts as gone.
    - `environment`: of the program.

    **Returns:**

    `OneProcess` for `None`.

    **Raises:**

    `UserError` if the processes do not find one another.
    """
    if place is None:
        return OneProcess()
    # It would take SIGTERM from us; here the processes agree on what a signal means.
    jax.config.update("jax_enable_preemption_service", False)
    service = _begin_service(place) if place.index == 0 else None
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=_own_devices(place, environment or {}),
            cluster_detection_method="deactivate",
            initialization_timeout=_START,
            # The first process's own service, which nobody meets at.
            coordinator_bind_address="localhost:0" if place.index == 0 else None,
            shutdown_timeout_seconds=10,
        )
    except RuntimeError as error:
        raise UserError(
            f"process {place.index} of {place.count} could not meet the others at {place.coordinator}: "
            f"{str(error).splitlines()[0]}. Is process 0 running there, and can its port be reached?"
        ) from error
    store = _CoordinationStore(distributed.global_state.client)

    def disconnect() -> None:
        jax.distributed.shutdown()
        if service is not None:
            service.communicate(b"done", timeout=10)

    return ManyProcesses(store, place.index, place.count, patience, disconnect=disconnect)


def _begin_service(place: ProcessPlace) -> subprocess.Popen[bytes]:
    port = place.coordinator.rpartition(":")[2]
    command = [sys.executable, "-c", _SERVICE, f"[::]:{port}", str(place.count), str(_LINGER)]
    # A session of its own: Ctrl-C is not for it.
    service = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert service.stdin is not None and service.stdout is not None
    if service.stdout.readline() != b"begun\n":
        raise UserError(
            f"the coordination service could not begin at port {port} of {place.coordinator}, which process 0 runs "
            "on: give another port by --coordinator HOST:PORT"
        )
    atexit.register(service.stdin.close)
    return service


# Reads until its input ends, which it also does where the first process is killed.
_SERVICE = """
import os, sys, time
from jaxlib import _jax
address, count, linger = sys.argv[1:]
service = _jax.get_distributed_runtime_service(address, int(count), heartbeat_timeout=100, shutdown_timeout=10)
print("begun", flush=True)
if sys.stdin.buffer.read() != b"done":
    time.sleep(int(linger))
os._exit(0)
"""


def _own_devices(place: ProcessPlace, environment: Mapping[str, str]) -> list[int] | None:
    """Several processes of a machine have an accelerator each, unless the scheduler shows each its own alone."""
    if place.of_machine is None or place.of_machine[1] == 1:
        return None
    seen = environment.get("CUDA_VISIBLE_DEVICES", "")
    return None if seen and "," not in seen else [place.of_machine[0]]
