"""What figures were measured on."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

from .._version import package_version

_BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16", "bf16"})  # Linux' names of the units: Intel, Intel and AMD, Arm


def machine() -> dict[str, Any]:
    """Devices, processor, how busy it is, and versions; JSON-able."""
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
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def dtype_advice(dtype: str, cpu_features: frozenset[str] | None) -> str | None:
    """What to say to whoever computes in bfloat16 where that is slower than float32; `None` if there is nothing to say.

    **Arguments:**

    - `dtype`: `model.dtype`.
    - `cpu_features`: of the processor that computes, as by `cpu_features`; `None` if there is another device, or if the
        system doesn't tell.
    """
    if dtype != "bfloat16" or cpu_features is None or cpu_features & _BFLOAT16:
        return None
    return (
        "this processor has no bfloat16 arithmetic (none of "
        + ", ".join(sorted(_BFLOAT16))
        + " among its features), so every product converts its weights to float32 first: "
        "--set model.dtype=float32 is faster here"
    )


def cpu_features() -> frozenset[str] | None:
    """What the processor can do, in Linux' words, if JAX computes on it; `None` where that is not known."""
    if jax.default_backend() != "cpu":
        return None
    lines = [*_cpuinfo("flags"), *_cpuinfo("Features")]  # the first on x86, the second on Arm
    return frozenset(lines[0].split()) if lines else None


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
