"""ONNX Runtime's sessions: the import, the options, and the check that a session runs on the requested device.

If the requested provider is not available, ONNX Runtime prints a warning and runs on the CPU. Here, that is an error.
`devices` lists the devices.
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
from typing import Any

from tiue_runtime.errors import BundleError, DeviceError, LoadingError, clip, is_out_of_memory
from tiue_runtime.host.forks import ForkSafeLock
from tiue_runtime.ort.devices import INSTALLS, KINDS, Device, Settings, provider_options

_LONGEST_REASON = 400  # characters of ONNX Runtime's text in a message
WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
INSTALL = f"pip install {INSTALLS['cpu']} (or {INSTALLS['cuda']} for an NVIDIA GPU)"


# If this entry is 1, ONNX Runtime refuses a graph that leaves nodes to the CPU provider, with the text LEFT_NODES.
_MUST_TAKE_ALL = "session.disable_cpu_ep_fallback"
LEFT_NODES = "fallback to CPU EP has been explicitly disabled"


def available_providers() -> list[str]:
    """List the providers of the installed ONNX Runtime and of installed plugins.

    Raises:
        DeviceError: ONNX Runtime cannot be imported.
    """
    built_in = list(load_onnxruntime().get_available_providers())
    plugins = [kind.provider for kind in KINDS.values() if kind.plugin and importlib.util.find_spec(kind.plugin)]
    return list(dict.fromkeys((*plugins, *built_in)))


def installed_wheels() -> dict[str, str]:
    """Return the installed wheels that provide `onnxruntime`, with their versions."""
    found: dict[str, str] = {}
    for name in WHEELS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def replace_wheels(extra: str) -> str:
    """Return the command that installs the wheel of one extra in place of all others."""
    installed = " ".join(installed_wheels() or WHEELS[:1])
    return f"pip uninstall -y {installed} && pip install {INSTALLS[extra]}"


def load_onnxruntime() -> Any:
    """Import onnxruntime when it is first needed, and check which wheel it came from.

    Raises:
        DeviceError: it is missing, broken, or installed twice.
    """
    wheels = installed_wheels()
    if len(wheels) > 1:
        found = " and ".join(f"{name} {number}" for name, number in wheels.items())
        raise DeviceError(
            f"{found} are installed together and overwrite each other's files. Keep one: "
            f"{replace_wheels('cpu')} (or {INSTALLS['cuda']})"
        )
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise DeviceError(f"ONNX Runtime is not installed. Install it: {INSTALL}") from error
        raise DeviceError(f"onnxruntime cannot be imported: {error}. Reinstall: {INSTALL}") from error
    if not hasattr(module, "InferenceSession"):
        raise DeviceError(f"onnxruntime is incomplete (another wheel removed its files): {replace_wheels('cpu')}")
    return module


def create_session(path: Path, device: Device, settings: Settings | None = None) -> Any:
    """Create a session of the graph in `path` that runs on `device`.

    Raises:
        BundleError: the graph is bad.
        DeviceError: the device or a setting was refused.
        LoadingError: memory ran out.
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
    """Create a session. Warn if nodes stay on the CPU although the device has kernels for them all."""
    model = os.fspath(path)
    if not device.row.must_take_all:
        return start_session(model, device, settings)
    try:
        return start_session(model, device, settings, must_take_all=True)
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        if LEFT_NODES not in str(error):
            raise
    session = start_session(model, device, settings)
    if session.get_providers()[0] == device.provider:
        warnings.warn(
            f"{path.name}: {device} leaves nodes to ONNX Runtime's CPU provider; tiue-runtime doctor tells which",
            stacklevel=4,
        )
    return session


def took_all(session: Any) -> bool:
    """Say whether a session was created with `must_take_all`."""
    return session.get_session_options().get_session_config_entry(_MUST_TAKE_ALL) == "1"


def run_options(entries: Mapping[str, str]) -> Any:
    """Make the options of one run of a session. onnxruntime is imported already."""
    options = importlib.import_module("onnxruntime").RunOptions()
    for key, value in entries.items():
        options.add_run_config_entry(key, value)
    return options


def shrinking(device: Device) -> dict[str, str]:
    """Return the entries of `run_options` that make the device's arena give back unused memory after the run."""
    return {"memory.enable_memory_arena_shrinkage": f"gpu:{device.index}" if device.is_gpu else "cpu:0"}


def start_session(model: str | bytes, device: Device, settings: Settings, *, must_take_all: bool = False) -> Any:
    """Create a session. It may run on another device than `device`: the caller must check.

    Args:
        model: a path, or the model itself.
        device: the requested device.
        settings: of the session.
        must_take_all: raise an error if the device would leave nodes of the graph to the CPU.

    Returns:
        ONNX Runtime's InferenceSession.

    Raises:
        DeviceError: ONNX Runtime cannot be imported, or a plugin does not find the device.
        Exception: anything that ONNX Runtime raises.
    """
    ort, kind = load_onnxruntime(), device.row
    options = _session_options(ort, device, settings, must_take_all)
    providers: list[tuple[str, dict[str, str]]] | None = provider_options(device, settings)
    if device.is_gpu:
        # ONNX Runtime prints loading failures of libraries to stdout, which is the same for all threads.
        with _loading.hold(), contextlib.redirect_stdout(sys.stderr):
            preload_libraries(ort, device)
    if kind.plugin and device.provider not in ort.get_available_providers():
        options.add_provider_for_devices([_plugin_device(ort, device)], providers[0][1])
        providers = None
    session = ort.InferenceSession(model, sess_options=options, providers=providers, enable_fallback=False)
    session.disable_fallback()  # A run that fails must not move to the CPU.
    return session


def _session_options(ort: Any, device: Device, settings: Settings, must_take_all: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.cpu_threads
    # Idle threads would spin, and take the cores from other sessions and from the application. On 2 cores, a picture of
    # the default model takes 70 ms with spinning and 22 ms without.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # ONNX Runtime keeps a memory layout for each XOR of all dimensions of the inputs. Height and width of square
    # latents cancel out, and so does the number of timesteps, which two inputs have. Small runs would get large runs'
    # memory.
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # Log nothing: errors are raised anyway.
    options.add_session_config_entry(_MUST_TAKE_ALL, str(int(must_take_all)))
    if settings.record_placement:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in device.row.session_entries.items():
        options.add_session_config_entry(key, value)
    return options


def preload_libraries(ort: Any, device: Device) -> None:
    """Load the libraries of a GPU from their wheels, because the system's loader does not search these."""
    ort.preload_dlls()  # CUDA and cuDNN
    package, *names = device.row.preloads or ("",)  # the wheel's package, then the names of its libraries
    spec = importlib.util.find_spec(package) if package else None
    for folder in spec.submodule_search_locations or [] if spec else []:
        for name in names:
            for library in (*Path(folder).glob(f"lib{name}.so.*"), *Path(folder).glob(f"{name}_*.dll")):
                with contextlib.suppress(OSError):  # The provider then does not start, and names the missing library.
                    ctypes.CDLL(str(library))


_loading = ForkSafeLock()


def _plugin_device(ort: Any, device: Device) -> Any:
    """Return ONNX Runtime's handle of a plugin's device. Register the plugin at its first use. Raises DeviceError."""
    with _loading.hold():
        if not _plugin_devices(ort, device):
            plugin = importlib.import_module(device.row.plugin)
            ort.register_execution_provider_library(device.provider, plugin.get_library_path())
        found = _plugin_devices(ort, device)
    if device.index >= len(found):
        raise DeviceError(f"{device.provider} finds {len(found)} GPUs that it can use")
    return found[device.index]


def _plugin_devices(ort: Any, device: Device) -> list[Any]:
    return [handle for handle in ort.get_ep_devices() if handle.ep_name == device.provider]


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type if the message is empty.

    OpenVINO's messages begin with places in its code, so their last line is returned. The line is shortened, because
    messages quote names from graphs, which may have any length.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return clip(lines[-1] if "[OpenVINO-EP]" in lines[0] else lines[0], _LONGEST_REASON)
