"""How much memory there is: what the system's files say, made here."""

from pathlib import Path

import pytest

from eqx_specgrpo.runtime import Memory, device_memory, host_memory

GIB = 2**30
MEMINFO = f"MemTotal:       {24 * GIB // 1024} kB\nMemFree:        1024 kB\nMemAvailable:   {10 * GIB // 1024} kB\n"


def write(root: Path, **files: object) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def test_a_machine_without_limits(tmp_path):
    assert host_memory(write(tmp_path)) == Memory(24 * GIB, 10 * GIB, is_shared=True)
    assert host_memory(tmp_path / "elsewhere") is None
    assert host_memory(write(tmp_path, **{"proc/meminfo": "MemTotal:       1 kB\n"})) is None


@pytest.mark.parametrize(
    ("cgroup", "folder", "limit", "usage", "cached"),
    [
        ("0::/job", "sys/fs/cgroup/job", "memory.max", "memory.current", "inactive_file"),
        # The limit is that of a group around the process's own.
        ("0::/job/step", "sys/fs/cgroup/job", "memory.max", "memory.current", "inactive_file"),
        # Within a container the path is not there, but the mount is.
        ("0::/job", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "5:cpu,memory:/job",
            "sys/fs/cgroup/memory/job",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_a_limit_of_a_cgroup(cgroup, folder, limit, usage, cached, tmp_path):
    files = {"proc/self/cgroup": cgroup, f"{folder}/{limit}": 8 * GIB, f"{folder}/{usage}": 5 * GIB}
    assert host_memory(write(tmp_path, **files)) == Memory(8 * GIB, 3 * GIB, is_shared=True)
    with_files = files | {f"{folder}/memory.stat": f"anon 7\n{cached} {2 * GIB}"}
    assert host_memory(write(tmp_path, **with_files)) == Memory(8 * GIB, 5 * GIB, is_shared=True)
    # No limit, or one beyond the machine.
    for nothing in ("max", 2**63 - 4096):
        unlimited = host_memory(write(tmp_path, **(with_files | {f"{folder}/{limit}": nothing})))
        assert unlimited == Memory(24 * GIB, 10 * GIB, is_shared=True)


def test_this_machine_says_something():
    memory = device_memory()
    assert memory is None or 0 < memory.available <= memory.total
