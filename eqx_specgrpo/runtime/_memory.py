"""How much memory there is to compute in."""

from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """Of the device that computes.

    **Arguments:**

    - `total`: bytes that there are for this process, in use or not.
    - `available`: bytes of them that are not in use.
    - `is_shared`: whether other processes use the same memory, as they do a machine's.
    """

    total: int
    available: int
    is_shared: bool


def device_memory() -> Memory | None:
    """Of the first device of this process: by its own statistics, or, where the CPU computes, the machine's or what a
    cgroup grants of it. `None` if nothing says how much there is."""
    import jax  # not with the package: `specgrpo --help` needs none of it

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host_memory()
    statistics = device.memory_stats() or {}
    if "bytes_limit" not in statistics:
        return None
    total = statistics["bytes_limit"]
    return Memory(total, total - statistics.get("bytes_in_use", 0), is_shared=False)


def host_memory(root: Path = Path("/")) -> Memory | None:
    """Of a Linux machine, within the limits of the cgroups that this process is in; `None` on other systems.

    **Arguments:**

    - `root`: where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = [line.split() for line in lines]
    sizes = {words[0].rstrip(":"): 1024 * int(words[1]) for words in fields if len(words) == 3}
    if "MemTotal" not in sizes or "MemAvailable" not in sizes:
        return None
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    for folder, limit_file, usage_file, cached in _cgroups(root):
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is None or usage is None or limit >= sizes["MemTotal"]:
            continue
        # Files that were read are counted as used, and give way.
        freed = _field(folder / "memory.stat", cached)
        total, available = min(total, limit), min(available, limit - max(usage - freed, 0))
    return Memory(total, max(available, 0), is_shared=True)


# Of the two versions: where it is mounted, files of limit and usage, and the field of cached files in `memory.stat`.
_VERSIONS = {
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
}


def _cgroups(root: Path) -> list[tuple[Path, str, str, str]]:
    """Those of this process and all that they are in. Within a container the outermost may be all that is seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in set(controllers.split(",")) & set(_VERSIONS):
            mount, *files = _VERSIONS[controller]
            inner = Path(path.lstrip("/"))
            found += [(root / mount / part, *files) for part in (inner, *inner.parents)]
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # not there, or "max"


def _field(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
