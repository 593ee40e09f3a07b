"""What figures were measured on."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

from ..runtime import package_version, source_commit


def machine() -> dict[str, Any]:
    """Devices, processor, how busy it is, versions, and the commit of the source; JSON-able."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "backend": jax.default_backend(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count(),
        # Other work on the machine, at the time; 1 a busy core.
        "load": os.getloadavg() if os.name == "posix" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "equinox")}
        | {"eqx_specgrpo": package_version()},
        "commit": source_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def stolen_seconds() -> float | None:
    """Processor time, of all cores and since the machine started, in which it had work and the host ran other guests;
    `None` where that is not known."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = next((line.split() for line in lines if line.startswith("cpu ")), [])
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else None


def _processor() -> str:
    return next(iter(_cpuinfo("model name")), platform.processor())


def _cpuinfo(field: str) -> list[str]:
    """Of each core; nothing where there is no such file or field."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == field]
