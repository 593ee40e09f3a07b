"""GPUs and TPUs that programs can be compiled for on a machine without one, and what a compiled program says of itself.

A GPU's properties are those that XLA reads (`stream_executor.GpuTargetConfigProto`); NVIDIA's data sheets and the
CUDA C++ Programming Guide's table of compute capabilities have them.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Name, compute capability's major number, multiprocessors, clock in GHz, bytes a second, bytes, level-2 cache in MiB.
_TARGETS = {
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 3_352e9, 85_017_755_648, 50),
    "h200": ("NVIDIA H200", 9, 132, 1.98, 4_800e9, 151_397_597_184, 50),
}
# Name of a topology with eight devices, and bytes of a device, by Google Cloud's documentation of each version.
_TPUS = {"v5e": ("v5e:2x4", 16 << 30), "v6e": ("v6e:2x4", 32 << 30)}
TARGETS = (*_TARGETS, *_TPUS)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_HOST = re.compile(r"callback|infeed|outfeed|\bsend\b|\brecv\b|HostCompute", re.IGNORECASE)
_SIZES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "f64": 8,
    "s64": 8,
}


def target_config(name: str) -> str:
    """As `jax.experimental.topologies` takes it."""
    described, major, cores, clock, bandwidth, memory, cache = _TARGETS[name]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} }}
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  core_count: {cores}  fpus_per_core: 128  clock_rate_ghz: {clock}
  memory_bandwidth: {int(bandwidth)}  device_memory_size: {memory}  l2_cache_size: {cache << 20}
  driver_version: "13.0.0"  runtime_version: "12.9.0"  compile_time_toolkit_version: "12.9.0"  dnn_version: "9.10.2"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{described}"
"""


def memory_of(name: str) -> int:
    """Bytes of one device."""
    return _TPUS[name][1] if name in _TPUS else _TARGETS[name][5]


def bandwidth_of(described: str) -> float | None:
    """Bytes a second of a device's memory, by what JAX calls it; `None` for one that is no target."""
    return next((target[4] for target in _TARGETS.values() if target[0] == described), None)


def mesh_of(name: str, devices: int) -> Mesh:
    """So many devices of one host, none of which is there.

    **Raises:**

    `SystemExit` that says what to install.
    """
    if name in _TPUS:
        return _mesh_of_tpus(name, devices)
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(name), topology=f"1x1x{devices}"
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise SystemExit(
            f"JAX cannot compile for {name} here ({error}). Its CUDA plugin is all that is needed, no driver and no "
            f"nvidia wheel: pip install --no-deps jax-cuda12-plugin=={jax.__version__} "
            f"jax-cuda12-pjrt=={jax.__version__}"
        ) from None
    return Mesh(described.devices, ("data",))


def _mesh_of_tpus(name: str, devices: int) -> Mesh:
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=_TPUS[name][0])
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise SystemExit(
            f"JAX cannot compile for {name} here ({error}). Its compiler is all that is needed: pip install --no-deps "
            "libtpu, in the version that `pip show --verbose jax` has for the extra `tpu`"
        ) from None
    return Mesh(np.asarray(described.devices[:devices]), ("data",))


def placed(mesh: Mesh, rows: int) -> Callable[[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """Puts shapes on the mesh: arrays with a row each are divided, all others are on every device."""

    def place(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if shape.sharding is not None:
            return shape
        divided = len(shape.shape) > 0 and shape.shape[0] == rows and rows % mesh.size == 0 and mesh.size > 1
        spec = PartitionSpec("data") if divided else PartitionSpec()
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    return place


class Thunk(NamedTuple):
    """What the host has the device do.

    **Arguments:**

    - `kind`: as XLA calls it, without its k.
    - `name`: of the kernel, say.
    - `loops`: how many loops it stands in.
    - `is_buffered`: whether it is recorded in a command buffer (a CUDA graph), and costs the host nothing of its own.
    """

    kind: str
    name: str
    loops: int
    is_buffered: bool


_CONTAINERS = {"While", "Conditional", "Sequential", "CommandBuffer"}


def read_thunks(text: str) -> Iterator[Thunk]:
    """Of XLA's list of thunks, which is indented by what contains what; those alone that contain nothing."""
    open_ones: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = re.match(r"( *)\d+: k(\w+)\s*\[[^]]*\]\s*(\S*)", line)
        if found is None:
            continue
        depth, kind, name = len(found[1]), found[2], found[3]
        while open_ones and open_ones[-1][0] >= depth:
            open_ones.pop()
        around = [kind for _, kind in open_ones]
        if kind in _CONTAINERS:
            open_ones.append((depth, kind))
        else:
            yield Thunk(kind, name, around.count("While"), "CommandBuffer" in around)


class Plan(NamedTuple):
    """What a compiled program needs and does.

    **Arguments:**

    - `argument_bytes`, `output_bytes`, `alias_bytes`, `temporary_bytes`: a device.
    - `kernels`, `kernels_in_loop`: launched once, and a turn of the outermost loop; `None` on a TPU, whose compiler
        does not say.
    - `kernels_in_loop_buffered`: those of the latter that a command buffer holds.
    - `collectives`, `collectives_in_loop`: by kind, once and a turn of the loop.
    - `custom_calls`: by target.
    - `host_calls`: whatever asks the host.
    - `copies`, `copies_in_loop`: large arrays that are copied whole, by shape: in all, and within loops.
    - `seconds`: of compiling.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    kernels: int | None
    kernels_in_loop: int | None
    kernels_in_loop_buffered: int | None
    collectives: dict[str, int]
    collectives_in_loop: dict[str, int]
    custom_calls: dict[str, int]
    host_calls: tuple[str, ...]
    copies: dict[str, int]
    copies_in_loop: dict[str, int]
    seconds: float

    @property
    def bytes(self) -> int:
        """In all, a device."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes


def read_plan(compiled: jax.stages.Compiled, thunks: str | None, seconds: float) -> Plan:
    """Of a program that was compiled with its thunks written down, or for a TPU, which has none."""
    needs: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    listed = list(read_thunks(thunks or ""))
    once, looped = ([one for one in listed if (one.loops > 0) == in_loop] for in_loop in (False, True))
    collectives, in_loop = (_collectives(once), _collectives(looped)) if thunks is not None else collectives_of(text)
    custom_calls = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    return Plan(
        argument_bytes=needs.argument_size_in_bytes,
        output_bytes=needs.output_size_in_bytes,
        alias_bytes=needs.alias_size_in_bytes,
        temporary_bytes=needs.temp_size_in_bytes,
        kernels=None if thunks is None else len(once),
        kernels_in_loop=None if thunks is None else len(looped),
        kernels_in_loop_buffered=None if thunks is None else sum(one.is_buffered for one in looped),
        collectives=collectives,
        collectives_in_loop=in_loop,
        custom_calls=dict(custom_calls),
        host_calls=tuple(sorted(name for name in custom_calls if _HOST.search(name)))
        + tuple(one.kind for one in listed if _HOST.search(one.kind)),
        copies=large_copies(text),
        copies_in_loop=large_copies("\n".join(split_by_loops(text)[1])),
        seconds=seconds,
    )


def _collectives(thunks: list[Thunk]) -> dict[str, int]:
    kinds = {name.replace("-", ""): name for name in COLLECTIVES}
    found = (re.sub(r"start$|done$", "", one.kind.lower()) for one in thunks if not one.kind.endswith("Done"))
    return dict(Counter(kinds[kind] for kind in found if kind in kinds))


def split_by_loops(text: str) -> tuple[list[str], list[str]]:
    """The computations of optimized HLO: those outside of loops, and those within them."""
    bodies = re.split(r"\n(?=(?:ENTRY )?%\S+ \()", text)
    called = {
        name[1]: (body, set(re.findall(r"(?:body|condition|calls|to_apply|branch_computations=\{)=?(%[\w.-]+)", body)))
        for body in bodies
        if (name := re.match(r"(?:ENTRY )?(%\S+) \(", body)) is not None
    }
    inside = set(re.findall(r"(?:body|condition)=(%[\w.-]+)", text))
    while more := {name for one in inside & called.keys() for name in called[one][1]} - inside:
        inside |= more
    once = [body for name, (body, _) in called.items() if name not in inside]
    return once, [body for name, (body, _) in called.items() if name in inside]


def collectives_of(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """Of optimized HLO: by kind, outside of loops and within them."""

    def count(bodies: list[str]) -> dict[str, int]:
        found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", "\n".join(bodies))
        return dict(Counter(found))

    once, looped = split_by_loops(text)
    return count(once), count(looped)


def large_copies(text: str, least: int = 1 << 20) -> dict[str, int]:
    """Arrays of optimized HLO that are copied as they are, by shape, and how often."""
    found: Counter[str] = Counter()
    for dtype, sizes in re.findall(r"= (\w+)\[([\d,]*)\]\S* copy(?:-start)?\(", text):
        size = _SIZES.get(dtype, 4)
        for one in filter(None, sizes.split(",")):
            size *= int(one)
        if size >= least:
            found[f"{dtype}[{sizes}]"] += 1
    return dict(found)


class AsksTheHost(Exception):
    """A program calls Python. JAX lowers no such call for a device that is not there."""


def compile_with_thunks(
    lower: Callable[[], jax.stages.Lowered], is_gpu: bool = True
) -> tuple[jax.stages.Compiled, str | None]:
    """The compiled program, and its list of thunks, which XLA says only in a file; `None` of a TPU's.

    **Raises:**

    `AsksTheHost`.
    """
    try:
        lowered = lower()
    except RuntimeError as error:
        if "Unknown backend" not in str(error):
            raise
        raise AsksTheHost(f"asks the host: {error}") from None
    if not is_gpu:
        return lowered.compile(), None
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        # The second is there if the passes changed something.
        for name in ("thunk_sequence_after_thunk_passes", "thunk_sequence"):
            for path in sorted(Path(folder).glob(f"*.{name}.txt")):
                return compiled, path.read_text(encoding="utf-8")
    raise RuntimeError("XLA has written no list of thunks: is this another version of jax than 0.10 or 0.11?")
