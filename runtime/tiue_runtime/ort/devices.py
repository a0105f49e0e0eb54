"""Devices: the strings that name them, the ONNX Runtime providers behind them, and what they are asked to do.

A kind of device is a row of `KINDS` and, where it takes options, a function in `OPTIONS`. Another provider
(DirectML) is one more of each.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tiue_runtime.bundle import CPU, CUDA, PORTABLE
from tiue_runtime.errors import DeviceError, shorten
from tiue_runtime.host.machine import thread_count

Precision = Literal["bf16", "fp32"]
GivesBack = Literal["on request", "after each run", "by reloading", "never"]


@dataclass(frozen=True)
class Kind:
    """A kind of device."""

    provider: str  # ONNX Runtime's name
    extra: str  # of tiue-runtime, which installs it
    variants: tuple[str, ...] = (PORTABLE,)  # of a bundle: those it can run, the best first
    memory: str = "cpu"  # ONNX Runtime's name of where its tensors are
    # How a session gives back the memory that a run took: "on request", by an option of that run; "after each run", by
    # the same option; "by reloading" the graph; or "never".
    gives_back: GivesBack = "never"
    loads_at_once: int = 1  # graphs; loading is the work of one thread where the CPU compiles them
    rest: tuple[str, ...] = ()  # kinds that take the nodes which it has no kernel for, in this order
    whole: bool = False  # whether it takes our graphs whole, so that nodes left to the CPU are worth a warning
    compiles: bool = False  # whether it makes files of a graph that are worth keeping
    library: str = ""  # the provider's file in ONNX Runtime's wheel, without prefix and suffix
    plugin: str = ""  # module of the wheel that brings the provider, where ONNX Runtime's own wheels do not
    remedy: str = ""  # when it does not start


KINDS = {
    "cpu": Kind("CPUExecutionProvider", "cpu", variants=(CPU, PORTABLE), gives_back="on request", loads_at_once=2),
    "openvino": Kind(
        "OpenVINOExecutionProvider",
        "openvino",
        gives_back="by reloading",
        whole=True,
        library="onnxruntime_providers_openvino",
        remedy=(
            "It needs an x86-64 CPU or, for another device_type in provider_options, such a device of Intel's and its "
            "driver"
        ),
    ),
    "cuda": Kind(
        "CUDAExecutionProvider",
        "cuda",
        variants=(CUDA, PORTABLE),
        memory="cuda",
        gives_back="after each run",
        rest=("cpu",),
        library="onnxruntime_providers_cuda",
        remedy=(
            'Check the NVIDIA driver (nvidia-smi) and the wheel: "tiue-runtime[cuda]" is for CUDA 13, '
            '"tiue-runtime[cuda12]" for CUDA 12'
        ),
    ),
    # TensorRT knows none of the operators that only ONNX Runtime has, so the CUDA variant is not for it.
    "tensorrt": Kind(
        "TensorrtExecutionProvider",
        "tensorrt",
        memory="cuda",
        rest=("cuda", "cpu"),
        compiles=True,
        library="onnxruntime_providers_tensorrt",
        remedy=(
            "Check the NVIDIA driver (nvidia-smi) and TensorRT, whose libraries must be of the major version that the "
            'wheel of ONNX Runtime was built with: pip install "tiue-runtime[tensorrt]"'
        ),
    ),
    "tensorrt-rtx": Kind(
        "NvTensorRTRTXExecutionProvider",
        "tensorrt-rtx",
        memory="cuda",
        rest=("cpu",),
        compiles=True,
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        remedy="It needs an RTX GPU of the 30 series or later and a driver for CUDA 13 (nvidia-smi)",
    ),
}

EXPECTED = 'expected "auto", "cpu", "openvino", "cuda", "tensorrt" or "tensorrt-rtx", the last three also with ":N"'


@dataclass(frozen=True)
class Device:
    """Where graphs run. `str(device)` is what a caller may pass to ask for it again."""

    kind: str  # a key of KINDS
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.index else self.kind

    @property
    def provider(self) -> str:
        """ONNX Runtime's name for it."""
        return KINDS[self.kind].provider

    @property
    def place(self) -> tuple[str, int]:
        """ONNX Runtime's name for its memory, and the index of that."""
        return KINDS[self.kind].memory, self.index

    @property
    def is_gpu(self) -> bool:
        """Whether its memory is not the CPU's."""
        return KINDS[self.kind].memory != "cpu"


def parse_device(text: object) -> Device:
    """Read "cpu", "openvino", "cuda", "cuda:1" and so on. Raises DeviceError."""
    if isinstance(text, str):
        kind, colon, index = text.partition(":")
        if kind in KINDS:
            numbered = Device(kind).is_gpu and index.isascii() and index.isdigit()
            if numbered or not colon:
                return Device(kind, int(index or 0))
    raise DeviceError(f"device: {EXPECTED}, got {shorten(text)}")


@dataclass(frozen=True)
class Settings:
    """How a session is set up, beyond its graph and device."""

    provider_options: Mapping[str, object] = field(default_factory=dict[str, object])  # win over those chosen here
    cuda_graphs: bool = False  # whether runs can be captured; on "cuda" only
    precision: Precision | None = None  # that OpenVINO computes in on the CPU; None is the best for the CPU
    threads: int | None = None  # of the CPU, for each session; None is `thread_count()`
    cache: Path | None = None  # a directory for what a provider compiles, of this graph and device alone
    record_placement: bool = False  # whether the session can tell which provider got which node

    @property
    def cpu_threads(self) -> int:
        """Threads of the CPU for each session."""
        return self.threads or thread_count()

    @property
    def own_openvino(self) -> bool:
        """Whether the caller's provider options, not ours, say what OpenVINO computes in and with how many threads."""
        given = self.provider_options
        return "load_config" in given or given.get("device_type", "CPU") != "CPU"


def provider_options(device: Device, settings: Settings) -> list[tuple[str, dict[str, str]]]:
    """The providers of a session in order of preference, each with its options as ONNX Runtime takes them."""
    own = {**_options_of(device, settings), **{name: _text(value) for name, value in settings.provider_options.items()}}
    rest = [Device(kind, device.index if KINDS[kind].memory != "cpu" else 0) for kind in KINDS[device.kind].rest]
    return [(device.provider, own), *((other.provider, _options_of(other, Settings())) for other in rest)]


def _options_of(device: Device, settings: Settings) -> dict[str, str]:
    options = OPTIONS.get(device.kind)
    return {} if options is None else options(device, settings)


def _cuda(device: Device, settings: Settings) -> dict[str, str]:
    options = {
        "device_id": str(device.index),
        # The default doubles the arena with each extension, and a session keeps what it has.
        "arena_extend_strategy": "kSameAsRequested",
        # The default times every algorithm of every convolution at every new shape: many seconds for a UNet.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return {**options, "enable_cuda_graph": "1"} if settings.cuda_graphs else options


def _openvino(device: Device, settings: Settings) -> dict[str, str]:
    if settings.own_openvino:
        return {"device_type": "CPU"}
    # No num_of_threads: that is also how many requests the provider prepares for each graph, each with its memory.
    config = {
        # Given always: the provider's own default is float32, whatever the CPU has.
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[settings.precision or "fp32"],
        "INFERENCE_NUM_THREADS": str(settings.cpu_threads),
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": config})}


def _tensorrt(device: Device, settings: Settings) -> dict[str, str]:
    # No trt_fp16_enable: it would let TensorRT lower what an fp16 bundle keeps in fp32 because it overflows. Without
    # it, the types are those written in the graph.
    # No trt_profile_*_shapes: they would have to name every feature between the two UNet graphs. Instead an engine
    # covers the shapes seen so far, and is built again when a new one lies outside; the profile is cached with it.
    options = {"device_id": str(device.index)}
    if settings.cache is None:
        return options
    return {
        **options,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(settings.cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(settings.cache),
    }


def _tensorrt_rtx(device: Device, settings: Settings) -> dict[str, str]:
    options = {"device_id": str(device.index)}
    return options if settings.cache is None else {**options, "nv_runtime_cache_path": str(settings.cache)}


OPTIONS = {"openvino": _openvino, "cuda": _cuda, "tensorrt": _tensorrt, "tensorrt-rtx": _tensorrt_rtx}


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    return str(int(value)) if isinstance(value, bool) else str(value)
