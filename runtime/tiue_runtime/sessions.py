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
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from .bundle import CPU, PORTABLE
from .errors import BundleError, DeviceError, LoadingError, is_out_of_memory
from .gpu import find_gpus
from .machine import has_bf16
from .providers import KINDS, Device, Settings, check_settings, parse_device, provider_options

WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
INSTALL = 'pip install "tiue-runtime[cpu]" (or "tiue-runtime[cuda]" for an NVIDIA GPU)'

# An ONNX model, y = Identity(x) on one float: the cheapest way to see whether a provider really starts.
_PROBE = bytes.fromhex(
    "080812003a3b0a100a017812017922084964656e74697479120570726f62655a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a001012"
)

# Where this entry is 1, a session is refused if nodes of its graph are left to the CPU provider, in these words.
_WHOLE = "session.disable_cpu_ep_fallback"
_NOT_WHOLE = "fallback to CPU EP has been explicitly disabled"

# y = a @ b on 16x16 floats: OpenVINO computes it in the precision it was asked for, or in float32.
_MATMUL = bytes.fromhex(
    "08083a590a110a01610a016212017922064d61744d756c120570726f62655a130a0161120e0a0c080112080a0208100a0208105a130a01"
    "62120e0a0c080112080a0208100a02081062130a0179120e0a0c080112080a0208100a02081042040a001012"
)


def choose_device(
    device: str = "auto", settings: Settings | None = None, variants: Collection[str] = (PORTABLE,)
) -> Device:
    """Turn "auto", "cpu", "openvino", "cuda", "cuda:N", "tensorrt" and so on into a device that works here.

    "auto" is CUDA, else OpenVINO, where a session really starts on it, else the CPU, with a warning if ONNX Runtime was
    built for one of them. Those that run none of `variants` are passed over, and so is OpenVINO where the CPU does not
    multiply in bf16 and there are graphs for ONNX Runtime's CPU provider, which are the faster then.
    Any other device is granted, with the provider options of `settings`, or refused with a DeviceError that says what
    is available and what to install.

    variants: the graphs to choose from, those of a bundle.
    """
    settings = settings or Settings()
    if device == "auto":
        if settings.provider_options:
            raise DeviceError('provider_options: expected the device they are for, got device="auto"')
        if settings.precision is not None:
            raise DeviceError('precision: expected device="openvino", got device="auto"')
        return _choose_any(variants)
    chosen = parse_device(device)
    check_settings(chosen, settings)
    kind = KINDS[chosen.kind]
    available = available_providers()
    if chosen.provider not in available:
        raise DeviceError(
            f"device: {device!r} needs {chosen.provider}, but the installed ONNX Runtime "
            f"({', '.join(installed_wheels()) or 'unknown wheel'}) has only {', '.join(available)}. "
            f"Replace it: {replace_wheels(kind.extra)}"
        )
    if chosen.kind != "cpu":
        problem = probe(chosen, settings.provider_options)
        if problem:
            raise DeviceError(f"device: {device!r} could not be started: {problem.rstrip('.')}. {kind.remedy}.")
    return chosen


def _choose_any(variants: Collection[str]) -> Device:
    available = available_providers()
    for device in (Device("cuda"), Device("openvino")):
        if device.provider not in available or set(variants).isdisjoint(KINDS[device.kind].variants):
            continue
        # The UNet of Stable Diffusion 2.1, 4 steps: 15.3 s with its CPU graphs, 16.8 s on OpenVINO in float32, which
        # also loads more slowly and takes more memory.
        if device.kind == "openvino" and CPU in variants and not has_bf16():
            continue
        problem = probe(device)
        if not problem:
            return device
        name = {"cuda": "CUDA", "openvino": "OpenVINO"}[device.kind]
        warnings.warn(f"running on the CPU, because {name} could not be started: {problem}", stacklevel=4)
    return Device("cpu")


def settle_precision(device: Device, settings: Settings) -> Settings:
    """`settings` with the precision that OpenVINO will compute in, and has shown to; those of other devices unchanged.

    It is the one asked for, else bf16 where the CPU multiplies in it. OpenVINO itself computes in float32, without a
    word, what it is asked to compute in bf16 on a CPU without. Raises DeviceError.
    """
    if device.kind != "openvino" or settings.own_openvino or settings.precision == "fp32":
        return settings
    asked = settings.precision == "bf16"
    granted = (asked or has_bf16()) and _rounds(device, replace(settings, precision="bf16"))
    if asked and not granted:
        raise DeviceError(
            "precision: OpenVINO computes in float32 on this CPU, which has no instructions for bf16 "
            '(avx512_bf16, amx_bf16), got "bf16". Load with "fp32" or without'
        )
    return replace(settings, precision="bf16" if granted else "fp32")


def _rounds(device: Device, settings: Settings) -> bool:
    """Whether a matrix product really loses what bf16, with 8 significant bits, cannot hold. Raises DeviceError."""
    try:
        session = _start(_MATMUL, device, settings, whole=True)
        a, b = np.full((16, 16), 1 + 2**-10, dtype=np.float32), np.eye(16, dtype=np.float32)
        return bool((session.run(None, {"a": a, "b": b})[0] == 1).all())
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        raise DeviceError(f"precision: {device} cannot show what it computes in: {first_line(error)}") from error


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
        return _start(model, device, settings)
    try:
        return _start(model, device, settings, whole=True)
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        if _NOT_WHOLE not in str(error):
            raise
    session = _start(model, device, settings)
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
    """Options of a run of a session."""
    options = load_onnxruntime().RunOptions()
    for key, value in entries.items():
        options.add_run_config_entry(key, value)
    return options


def shrinking_options(device: Device) -> Any:
    """Options of a run after which the arena of the device gives back the memory that is not in use."""
    arena = f"gpu:{device.index}" if device.is_gpu else "cpu:0"
    return run_options({"memory.enable_memory_arena_shrinkage": arena})


def probe(device: Device, options: Mapping[str, object] | None = None) -> str:
    """Start a session of almost nothing on `device`. Returns what went wrong, or "" when it was granted."""
    # TensorRT shall load, but need not spend seconds to build an engine of one node.
    small = {"trt_min_subgraph_size": 1000} if device.kind == "tensorrt" else {}
    try:
        session = _start(_PROBE, device, Settings(provider_options={**small, **(options or {})}))
        granted: list[str] = session.get_providers()
    except Exception as error:  # whatever it is, it is the answer
        return _with_reason(first_line(error), device)
    if granted[0] == device.provider:
        return ""
    return _with_reason(f"ONNX Runtime gave {', '.join(granted)} instead", device)


def _with_reason(problem: str, device: Device) -> str:
    """Add the reasons that ONNX Runtime only prints: there is no GPU, or a library is missing."""
    gpus = find_gpus() if device.is_gpu else ""
    reasons = [gpus] if isinstance(gpus, str) and gpus else []
    name = KINDS[device.kind].library
    module = sys.modules.get("onnxruntime")
    if name and module is not None and module.__file__:
        for library in (f"lib{name}.so", f"{name}.dll"):
            path = Path(module.__file__).parent / "capi" / library
            try:
                if path.is_file():
                    ctypes.CDLL(str(path))
            except OSError as error:
                if "undefined symbol" not in str(error):  # which ONNX Runtime itself would have defined
                    reasons.append(first_line(error))
    return f"{problem} ({'; '.join(reasons)})" if reasons else problem


def _start(model: str | bytes, device: Device, settings: Settings, *, whole: bool = False) -> Any:
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
