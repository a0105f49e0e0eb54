"""ONNX Runtime, in one place: which device, which session, and the proof that the device was granted.

Asking ONNX Runtime for a provider it cannot give only prints a warning and runs on the CPU. Here an explicit
device is granted or refused. Another provider (OpenVINO, TensorRT) is a new kind in `_PROVIDERS` and in
`choose_device`.
"""

import contextlib
import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import BundleError, DeviceError

WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
INSTALL = 'pip install "tiue-runtime[cpu]" (or "tiue-runtime[cuda]" for an NVIDIA GPU)'

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# An ONNX model, y = Identity(x) on one float: the cheapest way to see whether a provider really starts.
_PROBE = bytes.fromhex(
    "080812003a3b0a100a017812017922084964656e74697479120570726f62655a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a001012"
)


@dataclass(frozen=True)
class Device:
    """Where graphs run. `str(device)` is what a caller may pass to ask for it again."""

    kind: str  # a key of _PROVIDERS
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.index else self.kind

    @property
    def provider(self) -> str:
        """ONNX Runtime's name for it."""
        return _PROVIDERS[self.kind]


def choose_device(device: str = "auto") -> Device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that works here.

    "auto" is CUDA where a session really starts on it, else the CPU, with a warning if ONNX Runtime was
    built for CUDA. Any other device is granted or refused with a DeviceError that says what is available and
    what to install.
    """
    if device == "auto":
        return _choose_any()
    if not isinstance(device, str):  # pyright: ignore[reportUnnecessaryIsInstance] (callers may be untyped)
        raise DeviceError(f'device: expected "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    kind, _, index = device.partition(":")
    valid = kind in _PROVIDERS and (not index or (kind == "cuda" and index.isascii() and index.isdigit()))
    if not valid or device.endswith(":"):
        raise DeviceError(f'device: expected "auto", "cpu", "cuda" or "cuda:N", got {device!r}')
    chosen = Device(kind, int(index or 0))
    available = available_providers()
    if chosen.provider not in available:
        raise DeviceError(
            f"device: {device!r} needs {chosen.provider}, but the installed ONNX Runtime "
            f"({', '.join(installed_wheels()) or 'unknown wheel'}) has only {', '.join(available)}. "
            f"Replace it: {replace_wheels('cuda')}"
        )
    if chosen.kind != "cpu":
        problem = _probe(chosen)
        if problem:
            raise DeviceError(
                f"device: {device!r} could not be started: {problem}. Check the NVIDIA driver (nvidia-smi) "
                'and the wheel: "tiue-runtime[cuda]" is for CUDA 13, "tiue-runtime[cuda12]" for CUDA 12.'
            )
    return chosen


def _choose_any() -> Device:
    cuda = Device("cuda")
    if cuda.provider not in available_providers():
        return Device("cpu")
    problem = _probe(cuda)
    if problem:
        warnings.warn(f"running on the CPU, because CUDA could not be started: {problem}", stacklevel=4)
    return Device("cpu") if problem else cuda


def available_providers() -> list[str]:
    """The providers the installed ONNX Runtime was built with. Raises DeviceError."""
    return list(load_onnxruntime().get_available_providers())


def thread_count() -> int:
    """CPU threads of a session: the CPUs this process may use. A container's CPU quota is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def installed_wheels() -> dict[str, str]:
    """The installed wheels that provide `onnxruntime`, with their versions."""
    found: dict[str, str] = {}
    for name in WHEELS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def replace_wheels(extra: str) -> str:
    """The command that leaves exactly the wheel of one extra."""
    installed = " ".join(installed_wheels() or WHEELS[:1])
    return f'pip uninstall -y {installed} && pip install "tiue-runtime[{extra}]"'


def load_onnxruntime() -> Any:
    """Import onnxruntime, late. Raises DeviceError if it is missing, broken, or installed twice."""
    wheels = installed_wheels()
    if len(wheels) > 1:
        found = " and ".join(f"{name} {number}" for name, number in wheels.items())
        raise DeviceError(
            f"{found} are installed together and overwrite each other's files. Keep one: "
            f'{replace_wheels("cpu")} (or "tiue-runtime[cuda]")'
        )
    try:
        module = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise DeviceError(f"onnxruntime cannot be imported: {error}. Reinstall: {INSTALL}") from error
        raise DeviceError(f"ONNX Runtime is not installed. Install it: {INSTALL}") from error
    except ImportError as error:
        raise DeviceError(f"onnxruntime cannot be imported: {error}. Reinstall: {INSTALL}") from error
    if not hasattr(module, "InferenceSession"):
        raise DeviceError(f"onnxruntime is incomplete (another wheel removed its files): {replace_wheels('cpu')}")
    return module


def create_session(path: Path, device: Device) -> Any:
    """An ONNX Runtime session of the graph in `path` that really runs on `device`.

    Raises BundleError for a bad graph, DeviceError for a refused device.
    """
    try:
        session = _start(os.fspath(path), device)
    except DeviceError:
        raise
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        raise BundleError(f"{path} cannot be loaded on {device}: {first_line(error)}") from error
    if session.get_providers()[0] != device.provider:
        raise DeviceError(
            f"device: asked for {device} ({device.provider}) to run {path.name}, "
            f"got {', '.join(session.get_providers())}"
        )
    return session


def shrinking_options() -> Any:
    """Options of a run after which the CPU's arena gives back the memory that is not in use."""
    options = load_onnxruntime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _probe(device: Device) -> str:
    """Start a session of almost nothing on `device`. Returns what went wrong, or "" when it was granted."""
    try:
        session = _start(_PROBE, device)
    except Exception as error:  # whatever it is, it is the answer
        return first_line(error)
    granted: list[str] = session.get_providers()
    return "" if granted[0] == device.provider else f"ONNX Runtime gave {', '.join(granted)} instead"


def _start(model: str | bytes, device: Device) -> Any:
    """Create a session. It may run elsewhere than on `device`: the caller looks."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = thread_count()
    # Four sessions whose idle threads spin take the cores from each other (70 against 22 ms a picture of the default
    # model on 2 cores), and from the application.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # errors are raised too, and other messages are no use to a caller
    cpu = _PROVIDERS["cpu"]
    if device.kind == "cpu":
        session = ort.InferenceSession(model, sess_options=options, providers=[cpu])
    else:
        # The CPU is for nodes without a kernel on the device, such as shape arithmetic.
        providers = [(device.provider, {"device_id": device.index}), cpu]
        with contextlib.redirect_stdout(sys.stderr):  # where ONNX Runtime prints what it cannot load
            ort.preload_dlls()
            session = ort.InferenceSession(model, sess_options=options, providers=providers, enable_fallback=False)
    session.disable_fallback()  # a failing run shall fail, not move to the CPU
    return session


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
