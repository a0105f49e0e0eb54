"""ONNX Runtime, in one place: which device, which session, and the proof that the device was granted.

Asking ONNX Runtime for a provider it cannot give only prints a warning and runs on the CPU. Here an explicit
device is granted or refused. What devices there are is in providers.py.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any

from tiue_runtime.errors import BundleError, DeviceError, LoadingError, is_out_of_memory
from tiue_runtime.ort.devices import KINDS, Device, Settings, provider_options

WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
INSTALL = 'pip install "tiue-runtime[cpu]" (or "tiue-runtime[cuda]" for an NVIDIA GPU)'


# Where this entry is 1, a session is refused if nodes of its graph are left to the CPU provider, in these words.
_WHOLE = "session.disable_cpu_ep_fallback"
_NOT_WHOLE = "fallback to CPU EP has been explicitly disabled"


def available_providers() -> list[str]:
    """The providers the installed ONNX Runtime was built with, and those that installed plugins bring.

    Raises DeviceError.
    """
    built_in = list(load_onnxruntime().get_available_providers())
    plugins = [kind.provider for kind in KINDS.values() if kind.plugin and importlib.util.find_spec(kind.plugin)]
    return list(dict.fromkeys((*plugins, *built_in)))


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


def create_session(path: Path, device: Device, settings: Settings | None = None) -> Any:
    """An ONNX Runtime session of the graph in `path` that really runs on `device`.

    Raises BundleError for a bad graph, DeviceError for a refused device or setting, LoadingError.
    """
    settings = settings or Settings()
    try:
        session = _start_graph(path, device, settings)
    except DeviceError:
        raise
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        if is_out_of_memory(error):
            raise LoadingError(f"{path.stem} ran out of memory while it was loaded on {device}") from error
        if settings.cuda_graphs:
            raise DeviceError(
                f"{path.name} cannot be loaded on {device}: {first_line(error).rstrip('.')}. "
                "cuda_graphs=True needs every node on the GPU: if that is why, load without it"
            ) from error
        raise BundleError(f"{path} cannot be loaded on {device}: {first_line(error)}") from error
    if session.get_providers()[0] != device.provider:
        raise DeviceError(
            f"device: asked for {device} ({device.provider}) to run {path.name}, "
            f"got {', '.join(session.get_providers())}"
        )
    return session


def _start_graph(path: Path, device: Device, settings: Settings) -> Any:
    """Create a session, with a warning where nodes are left to the CPU by a device that takes our graphs whole."""
    model = os.fspath(path)
    if not KINDS[device.kind].whole:
        return start_session(model, device, settings)
    try:
        return start_session(model, device, settings, whole=True)
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        if _NOT_WHOLE not in str(error):
            raise
    session = start_session(model, device, settings)
    if session.get_providers()[0] == device.provider:
        warnings.warn(
            f"{path.name}: {device} leaves nodes to ONNX Runtime's CPU provider; tiue-runtime doctor tells which",
            stacklevel=4,
        )
    return session


def is_whole(session: Any) -> bool:
    """Whether a session was refused any node on the CPU provider that its device might have left."""
    return session.get_session_options().get_session_config_entry(_WHOLE) == "1"


def run_options(entries: Mapping[str, str]) -> Any:
    """Make options of one run of a session. ONNX Runtime was checked when the session was made."""
    options = importlib.import_module("onnxruntime").RunOptions()
    for key, value in entries.items():
        options.add_run_config_entry(key, value)
    return options


def shrinking(device: Device) -> dict[str, str]:
    """Return entries of `run_options` after which the device's arena gives back the memory that is not in use."""
    return {"memory.enable_memory_arena_shrinkage": f"gpu:{device.index}" if device.is_gpu else "cpu:0"}


def start_session(model: str | bytes, device: Device, settings: Settings, *, whole: bool = False) -> Any:
    """Create a session. It may run elsewhere than on `device`, unless `whole`: the caller looks."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.cpu_threads
    # Four sessions whose idle threads spin take the cores from each other (70 against 22 ms a picture of the default
    # model on 2 cores), and from the application.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # ONNX Runtime looks up how an earlier run laid out its memory by the XOR of all dimensions of the inputs. Square
    # latents of any size have the same, and so has any number of timesteps: small runs would take what large ones took.
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # errors are raised too, and other messages are no use to a caller
    options.add_session_config_entry(_WHOLE, str(int(whole)))
    if settings.record_placement:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if device.kind == "cuda":
        # Weights outside the arena, so that shrinking it after a run leaves little more than them.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    providers = provider_options(device, settings)
    if device.kind == "cpu":
        session = ort.InferenceSession(model, sess_options=options, providers=providers)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # where ONNX Runtime prints what it cannot load
            if device.is_gpu:
                preload_libraries(ort, device)
            if KINDS[device.kind].plugin and device.provider not in ort.get_available_providers():
                options.add_provider_for_devices([_plugin_device(ort, device)], providers[0][1])
                providers = None
            session = ort.InferenceSession(model, sess_options=options, providers=providers, enable_fallback=False)
    session.disable_fallback()  # a failing run shall fail, not move to the CPU
    return session


def preload_libraries(ort: Any, device: Device) -> None:
    """Load the libraries of a GPU from the wheels that bring them, where the system's loader does not look."""
    ort.preload_dlls()  # of CUDA and cuDNN
    spec = importlib.util.find_spec("tensorrt_libs") if device.kind == "tensorrt" else None
    for folder in spec.submodule_search_locations or [] if spec else []:
        for name in ("nvinfer", "nvonnxparser"):  # the second needs the first
            for library in (*Path(folder).glob(f"lib{name}.so.*"), *Path(folder).glob(f"{name}_*.dll")):
                with contextlib.suppress(OSError):  # then the provider does not start and says what it lacks
                    ctypes.CDLL(str(library))


_registering = Lock()


def _plugin_device(ort: Any, device: Device) -> Any:
    """ONNX Runtime's handle of a device whose provider is a plugin, registered at its first use. Raises DeviceError."""
    with _registering:
        if not _plugin_devices(ort, device):
            plugin = importlib.import_module(KINDS[device.kind].plugin)
            ort.register_execution_provider_library(device.provider, plugin.get_library_path())
        found = _plugin_devices(ort, device)
    if device.index >= len(found):
        raise DeviceError(f"{device.provider} finds {len(found)} GPUs that it can use")
    return found[device.index]


def _plugin_devices(ort: Any, device: Device) -> list[Any]:
    return [handle for handle in ort.get_ep_devices() if handle.ep_name == device.provider]


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type; of OpenVINO's the last, after where in its code it was."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[-1] if "[OpenVINO-EP]" in lines[0] else lines[0]
