"""How much memory a run will take and how much is free, so that requests are split before they fail."""

import ctypes
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from .bundle import CUDA, PORTABLE, Manifest
from .machine import control_groups
from .providers import Device

Mode = Literal["parallel", "partial", "sequential"]  # from the fastest to the one that takes the least

# Timesteps per run of the decoder; None is all.
_TIMESTEPS: dict[Mode, int | None] = {"parallel": None, "partial": 2, "sequential": 1}

# The part of the free memory that a run may be planned to take. The rest is for what the estimate, measured on another
# machine, does not know (fragments of ONNX Runtime's arena, workspaces of convolutions) and for other programs.
USABLE = 0.8

_MIB = 2**20


def timesteps_at_once(mode: Mode, steps: int) -> int:
    """k, the timesteps of one decoder run."""
    return min(_TIMESTEPS[mode] or steps, steps)


def lower_mode(mode: Mode, steps: int) -> Mode | None:
    """The next mode that takes fewer timesteps at once, None at the end."""
    modes = list(_TIMESTEPS)
    now = timesteps_at_once(mode, steps)
    return next((m for m in modes[modes.index(mode) :] if timesteps_at_once(m, steps) < now), None)


class Budget:
    """Whether runs of a bundle's graphs fit into the free memory of a device, by the estimates in its manifest.

    Without an estimate, or where the free memory is not known, everything fits.
    """

    def __init__(self, manifest: Manifest, variant: str, device: Device) -> None:
        self._manifest = manifest
        self._variant = variant
        self._device = device
        self._held: dict[str, float] = {}
        self._lock = Lock()
        self._requests = 0

    @contextmanager
    def request(self) -> Generator[None]:
        """Around a request: of several at once, none can count on what a graph keeps."""
        with self._lock:
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1

    def fits(self, graph: str, rows: int, latents: int, before: tuple[str, int, int] | None = None) -> bool:
        """Whether a run of `rows` rows of `latents` = h*w latent pixels fits, also beside what a run `before` keeps."""
        need = self._more(graph, rows, latents)
        if need <= 0:
            return True
        free = free_memory(self._device)
        if free is not None and before is not None:
            free -= max(self._more(*before), 0)
        return free is None or need <= USABLE * free

    def _more(self, graph: str, rows: int, latents: int) -> float:
        """What a run needs beyond what its graph has kept. 0 where nothing is known."""
        kept = self._held.get(graph, 0) if self._requests <= 1 else 0
        return (self._need(graph, rows, latents) or 0) - kept

    def succeeded(self, graph: str, rows: int, latents: int) -> None:
        """Note a run that fitted, of a graph that keeps its memory for the next one."""
        self._held[graph] = max(self._held.get(graph, 0), self._need(graph, rows, latents) or 0)

    def released(self, graph: str) -> None:
        """Note that a graph gave back what it kept."""
        self._held.pop(graph, None)

    def fastest_mode(self, graph: str, steps: int, images: int, latents: int) -> Mode:
        """The first mode whose decoder runs fit; the last one if none does."""
        for mode in _TIMESTEPS:
            if self.fits(graph, timesteps_at_once(mode, steps) * images, latents):
                return mode
        return "sequential"

    def _need(self, graph: str, rows: int, latents: int) -> float | None:
        for variant in (self._variant, PORTABLE):
            use = self._manifest.memory.get(variant, {}).get(graph)
            if use is not None:
                # Estimated by the portable graph, whose attention maps CUDA's fused attention does not keep.
                fused = self._variant == CUDA and variant == PORTABLE
                return (replace(use, per_latent_squared=0) if fused else use).bytes(rows, latents)
        return None


def free_memory(device: Device) -> int | None:
    """Bytes that this process can still get on a device; None if that cannot be known."""
    if device.is_gpu:
        return _cuda_free(device.index)
    if sys.platform == "win32":
        return _windows_free()
    # macOS answers only through its own kernel interface.
    return _linux_free(Path("/")) if sys.platform.startswith("linux") else None


def give_back() -> None:
    """Have the C library return freed memory to the system (glibc keeps what lies between other blocks)."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _linux_free(root: Path) -> int | None:
    """The least of what the machine has available, and what control groups and RLIMIT_AS leave to this process."""
    import resource  # exists on Unix only

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
    """The lines `Name:   123 kB` of a file in /proc."""
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        words = line.split()
        if words[2:] == ["kB"]:
            yield words[0].rstrip(":"), int(words[1])


def _cgroups_left(root: Path) -> Iterator[int]:
    """What the limit of each control group of this process leaves, at every level of versions 1 and 2."""
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
        # Files read once, such as the bundle's, stay counted until the memory is wanted.
        pages = (directory / "memory.stat").read_text(encoding="ascii").split()
        used -= int(pages[pages.index(cache) + 1]) if cache in pages else 0
        yield int(most) - used


def _windows_free() -> int | None:
    """The least of free memory, memory that may still be committed, and address space."""
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


def _cuda_free(index: int, load: Callable[[str], Any] = ctypes.CDLL) -> int | None:
    """Free bytes of a GPU through the CUDA driver, which numbers them as ONNX Runtime does (CUDA_VISIBLE_DEVICES)."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        driver = load("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
            return None
        # The primary context is the one ONNX Runtime works in, so nothing is created here that is not there already.
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
