"""Where the graphs of a bundle run: device, variant, precision and settings."""

import ctypes
import operator
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import SupportsIndex, cast, get_args

import numpy as np

from tiue_runtime.bundle import CPU, PORTABLE
from tiue_runtime.errors import BundleError, DeviceError, shorten
from tiue_runtime.host.gpu import find_gpus
from tiue_runtime.host.machine import has_bf16
from tiue_runtime.ort import sessions
from tiue_runtime.ort.devices import KINDS, OPTIONS, Device, Precision, Settings, parse_device
from tiue_runtime.ort.sessions import first_line, installed_wheels, replace_wheels


def choose_variant(device: Device, held: Collection[str], asked: str | None = None) -> str:
    """The variant, among those a bundle holds, whose graphs run on `device`: the one asked for, else the best.

    Raises BundleError if the one asked for is absent, DeviceError if it, or all there are, do not run there.
    """
    runs = KINDS[device.kind].variants
    if asked is not None and asked not in tuple(held):
        raise BundleError(f"variant: expected one that the bundle holds ({', '.join(held)}), got {shorten(asked)}")
    usable = [variant for variant in runs if variant in (held if asked is None else (asked,))]
    if not usable:
        offered = f"got {asked!r}" if asked else f"the bundle holds only {', '.join(held)}"
        raise DeviceError(f"variant: {device} runs {' or '.join(runs)} graphs, {offered}")
    return usable[0]


MOST_THREADS = 4096

# Options that follow from other arguments, by the argument.
_OWNED = {"device_id": "device", "enable_cuda_graph": "cuda_graphs", "trt_cuda_graph_enable": "cuda_graphs"}


def check_settings(device: Device, settings: Settings) -> None:
    """Raise DeviceError for settings that `device` cannot have."""
    if settings.cuda_graphs and device.kind != "cuda":
        raise DeviceError(f'cuda_graphs: expected device="cuda", got {device}')
    if settings.threads is not None and not _is_count(settings.threads):
        expected = f"an integer from 1 to {MOST_THREADS}, or None for all CPUs"
        raise DeviceError(f"threads: expected {expected}, got {shorten(settings.threads)}")
    options = cast(object, settings.provider_options)
    if not isinstance(options, Mapping):
        raise DeviceError(f"provider_options: expected a dictionary, got {shorten(options)}")
    _check_openvino(device, settings)
    if settings.provider_options and device.kind not in OPTIONS:
        raise DeviceError(f"provider_options: {device} has none, got {', '.join(settings.provider_options)}")
    for name in settings.provider_options:
        if name in _OWNED:
            raise DeviceError(f"provider_options: {name} follows from {_OWNED[name]}=, pass that instead")


def _is_count(value: object) -> bool:
    return (
        isinstance(value, SupportsIndex) and not isinstance(value, bool) and 1 <= operator.index(value) <= MOST_THREADS
    )


def _check_openvino(device: Device, settings: Settings) -> None:
    if device.kind == "openvino" and settings.own_openvino:
        for name in ("precision", "threads"):
            if getattr(settings, name) is not None:
                raise DeviceError(f"{name}: follows from device_type and load_config of provider_options, pass either")
    if settings.precision is None:
        return
    expected = " or ".join(f'"{precision}"' for precision in get_args(Precision))
    if settings.precision not in get_args(Precision):
        raise DeviceError(
            f"precision: expected {expected}, or None for the best of the CPU, got {shorten(settings.precision)}"
        )
    if device.kind != "openvino":
        raise DeviceError(f'precision: expected device="openvino", got {device}, which computes as graphs are written')


# An ONNX model, y = Identity(x) on one float: the cheapest way to see whether a provider really starts.
_PROBE = bytes.fromhex(
    "080812003a3b0a100a017812017922084964656e74697479120570726f62655a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a001012"
)


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
    available = sessions.available_providers()
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
    available = sessions.available_providers()
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
        session = sessions.start_session(_MATMUL, device, settings, whole=True)
        a, b = np.full((16, 16), 1 + 2**-10, dtype=np.float32), np.eye(16, dtype=np.float32)
        return bool((session.run(None, {"a": a, "b": b})[0] == 1).all())
    except Exception as error:  # ONNX Runtime's own exceptions share no other base
        raise DeviceError(f"precision: {device} cannot show what it computes in: {first_line(error)}") from error


def probe(device: Device, options: Mapping[str, object] | None = None) -> str:
    """Start a session of almost nothing on `device`. Returns what went wrong, or "" when it was granted."""
    # TensorRT shall load, but need not spend seconds to build an engine of one node.
    small = {"trt_min_subgraph_size": 1000} if device.kind == "tensorrt" else {}
    try:
        session = sessions.start_session(_PROBE, device, Settings(provider_options={**small, **(options or {})}))
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
