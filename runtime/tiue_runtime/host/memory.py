"""Free memory of this computer and of its GPUs, and returning freed memory to the system."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiue_runtime.host.gpu import DRIVER
from tiue_runtime.host.machine import control_groups


def free_memory(gpu: int | None = None) -> int | None:
    """Return the bytes that this process can still get, or None if they cannot be known.

    Args:
        gpu: the GPU's number, or None for the computer's own memory.
    """
    if gpu is not None:
        return cuda_free(gpu)
    if sys.platform == "win32":
        return windows_free()
    # macOS answers only through its own kernel interface.
    return linux_free(Path("/")) if sys.platform.startswith("linux") else None


def give_back() -> None:
    """Make the C library return freed memory to the system. glibc otherwise keeps blocks that lie between others."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def linux_free(root: Path) -> int | None:
    """Return the least of: the machine's available memory, and the bytes left by control groups and RLIMIT_AS."""
    import resource  # It exists on Unix only.

    left: list[int] = []
    try:
        left += [1024 * kib for name, kib in _kib(root / "proc/meminfo") if name == "MemAvailable"]
        left += _cgroups_left(root)
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            left += [limit - 1024 * kib for name, kib in _kib(root / "proc/self/status") if name == "VmSize"]
    except (OSError, ValueError):
        return None
    return max(min(left), 0) if left else None


def _kib(path: Path) -> Iterator[tuple[str, int]]:
    """Read the lines `Name:   123 kB` of a file in /proc."""
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        words = line.split()
        if words[2:] == ["kB"]:
            yield words[0].rstrip(":"), int(words[1])


def _cgroups_left(root: Path) -> Iterator[int]:
    """List the bytes that each control group of this process leaves, at every level of versions 1 and 2."""
    for directory, unified in control_groups(root, "memory"):
        if unified:
            limit, usage, cache = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        if not (directory / limit).is_file():
            continue
        most = (directory / limit).read_text(encoding="ascii").strip()
        if most == "max":
            continue
        used = int((directory / usage).read_text(encoding="ascii"))
        # Pages of files read once, for example the bundle's, are counted but can be reclaimed.
        pages = (directory / "memory.stat").read_text(encoding="ascii").split()
        used -= int(pages[pages.index(cache) + 1]) if cache in pages else 0
        yield int(most) - used


def windows_free() -> int | None:
    """Return the least of free memory, memory that may still be committed, and address space."""
    if sys.platform != "win32":
        return None
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(min(status.available, status.available_commit, status.available_virtual))


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_commit", ctypes.c_uint64),
        ("available_commit", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    )


def cuda_free(index: int, load: Callable[[str], Any] = ctypes.CDLL) -> int | None:
    """Return the free bytes of a GPU. The CUDA driver numbers GPUs as ONNX Runtime does (CUDA_VISIBLE_DEVICES)."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        driver = load(DRIVER)
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
            return None
        # ONNX Runtime works in the primary context, so retaining it creates nothing new.
        if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
            return None
        try:
            if driver.cuCtxPushCurrent_v2(context):
                return None
            failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        finally:
            driver.cuDevicePrimaryCtxRelease_v2(device)
    except (OSError, AttributeError):  # no driver, or one without these functions
        return None
    return None if failed else free.value
