"""The CPU time and the CPU instructions that this process may use."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def thread_count(root: Path = Path("/")) -> int:
    """Return the CPU threads of a session: the CPUs of this process, at most its quota of CPU time, rounded up."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(root)
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Return the instruction sets of the CPU by their names in /proc/cpuinfo. Known on Linux only, else empty."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


def has_bf16(root: Path = Path("/")) -> bool:
    """Say whether the CPU has bfloat16 instructions (avx512_bf16 or amx_bf16)."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_flags(root))


def control_groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """List the directories of this process's control groups that a controller may limit, from the innermost to the top.

    Yields:
        A directory, and whether it is of version 2, whose files have other names.

    Raises:
        OSError, ValueError: the system's files cannot be read.
    """
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        path = PurePosixPath(group.lstrip("/"))
        # In a container, the path may be the host's and absent here. The container's own group is then the top.
        for directory in (top / path, *(top / parent for parent in path.parents)):
            yield directory, not controllers


def _cpu_quota(root: Path) -> float | None:
    """Return the CPU time that control groups grant, in CPUs: the least of all levels, or None without a limit."""
    if not sys.platform.startswith("linux"):
        return None
    quotas: list[float] = []
    try:
        for directory, unified in control_groups(root, "cpu"):
            files = ("cpu.max",) if unified else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            if not all((directory / file).is_file() for file in files):
                continue
            # Both numbers are in microseconds. Version 2 has them in one file.
            quota, period = " ".join((directory / file).read_text(encoding="ascii") for file in files).split()
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    except (OSError, ValueError):
        return None
    return min(quotas, default=None)
