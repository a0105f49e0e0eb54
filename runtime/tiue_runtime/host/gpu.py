"""NVIDIA GPUs as the driver sees them, through its own libraries: no package, and no CUDA toolkit, is needed."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MANAGEMENT = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"  # of the driver, too
_CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpu:
    """One GPU, in the driver's order, which CUDA_VISIBLE_DEVICES changes and "cuda:N" counts in."""

    name: str
    memory: int  # bytes, all of it
    capability: tuple[int, int]  # compute capability, such as (8, 9)


def find_gpus(load: Callable[[str], Any] = ctypes.CDLL) -> list[Gpu] | str:
    """The GPUs, at least one, or why there are none. `load` opens a library by name, or raises OSError."""
    count = ctypes.c_int()
    try:
        driver = load(_DRIVER)
        failed: int = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):  # the library is not there, or another than NVIDIA's
        return f"there is no NVIDIA driver ({_DRIVER})"
    if failed == _NO_DEVICE or (not failed and not count.value):
        return "the NVIDIA driver finds no GPU"
    if failed:
        return f"the NVIDIA driver does not start (CUDA error {failed})"
    return [_describe(driver, index) for index in range(count.value)]


def driver_version(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """The driver's version and the newest CUDA it runs, such as "580.65, CUDA 13.0"; "" for what cannot be known."""
    parts: list[str] = []
    text, number = ctypes.create_string_buffer(96), ctypes.c_int()
    try:
        management = load(_MANAGEMENT)
        if not management.nvmlInit_v2():
            if not management.nvmlSystemGetDriverVersion(text, len(text)):
                parts.append(text.value.decode())
            management.nvmlShutdown()
    except (OSError, AttributeError):  # the library is not there, or another than NVIDIA's
        pass
    try:
        if not load(_DRIVER).cuDriverGetVersion(ctypes.byref(number)):
            parts.append(f"CUDA {number.value // 1000}.{number.value % 1000 // 10}")
    except (OSError, AttributeError):
        pass
    return ", ".join(parts)


def _describe(driver: Any, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability: list[int] = []
    for attribute in _CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(errors="replace"), memory.value, (capability[0], capability[1]))
