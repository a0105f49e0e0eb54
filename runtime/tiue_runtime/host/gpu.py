"""NVIDIA GPUs, as the driver's own libraries report them. Neither a package nor a CUDA toolkit is needed."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MANAGEMENT = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"  # another library of the driver
_CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpu:
    """One GPU. "cuda:N" counts in the driver's order, which CUDA_VISIBLE_DEVICES changes."""

    name: str
    memory: int  # bytes, in all
    capability: tuple[int, int]  # compute capability, for example (8, 9)


def find_gpus(load: Callable[[str], Any] = ctypes.CDLL) -> list[Gpu] | str:
    """List the GPUs.

    Args:
        load: opens a library by name, or raises OSError.

    Returns:
        At least one GPU, or the reason why there is none.
    """
    count = ctypes.c_int()
    try:
        driver = load(DRIVER)
        failed: int = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):  # the library is not there, or another than NVIDIA's
        return f"there is no NVIDIA driver ({DRIVER})"
    if failed == _NO_DEVICE or (not failed and not count.value):
        return "the NVIDIA driver finds no GPU"
    if failed:
        return f"the NVIDIA driver does not start (CUDA error {failed})"
    return [_describe(driver, index) for index in range(count.value)]


def driver_version(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """Return the driver's version and the newest CUDA that it runs, for example "580.65, CUDA 13.0".

    A part that cannot be known is left out; "" if both are unknown.
    """
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
        if not load(DRIVER).cuDriverGetVersion(ctypes.byref(number)):
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
