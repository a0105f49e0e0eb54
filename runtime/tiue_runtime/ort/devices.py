"""Devices: their names, the ONNX Runtime providers behind them, and the providers' options.

A kind of device is a row of `KINDS`. Code outside this module reads the row and never compares kinds. Another provider,
for example DirectML, is one more row.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tiue_runtime.bundle import CPU, CUDA, PORTABLE, WEB
from tiue_runtime.choices import Precision
from tiue_runtime.errors import DeviceError, shorten
from tiue_runtime.host.machine import thread_count

GivesBack = Literal["on request", "after each run", "by reloading", "never"]


@dataclass(frozen=True)
class Kind:
    """A kind of device, as data.

    gives_back: how a session gives back the memory that a run took. "on request": by an option of that run.
        "after each run": by the same option, on every run. "by reloading": only by loading the graph again.
        "never": not at all.
    """

    provider: str  # ONNX Runtime's name
    title: str  # for people
    extra: str  # the extra of tiue-runtime that installs it
    gives_back: GivesBack = "never"
    forks: bool = False  # whether a forked process can load graphs again
    loads_at_once: int = 1  # how many graphs of a bundle are loaded at the same time
    variants: tuple[str, ...] = (PORTABLE,)  # the variants of a bundle that it can run, the best first
    memory: str = "cpu"  # ONNX Runtime's name of the memory that holds its tensors
    options: "Callable[[Device, Settings], dict[str, str]] | None" = None  # None: the provider takes no options
    # Whether a caller's provider options replace those that follow from precision and threads.
    takes_over: Callable[[Mapping[str, object]], bool] = lambda given: False
    precisions: tuple[Precision, ...] = ()  # choices, proven by a product; (): it computes in the types of the graph
    cuda_graphs: bool = False  # whether runs can be recorded
    session_entries: Mapping[str, str] = field(default_factory=dict[str, str])  # entries of the session options
    probe_options: Mapping[str, object] = field(default_factory=dict[str, object])  # provider options of the probe
    fallback: tuple[str, ...] = ()  # kinds that take the nodes for which it has no kernel, in this order
    must_take_all: bool = False  # whether it has kernels for all our nodes; a node on the CPU then causes a warning
    compiles: bool = False  # whether it compiles graphs to files that are worth keeping
    library: str = ""  # the provider's file in ONNX Runtime's wheel, without prefix and suffix
    preloads: tuple[str, ...] = ()  # a package, then the libraries of it that must be loaded first, in this order
    plugin: str = ""  # the module that brings the provider, if ONNX Runtime's own wheels do not
    slower_than: str = ""  # a variant: ONNX Runtime's CPU provider runs it faster than this kind does without bf16
    remedy: str = ""  # the advice if a device does not start

    @property
    def is_gpu(self) -> bool:
        """Whether it has its own memory. Devices of such a kind are numbered."""
        return self.memory != "cpu"


@dataclass(frozen=True)
class Device:
    """A place where graphs run. `parse_device(str(device))` gives the same device."""

    kind: str  # a key of KINDS
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.index else self.kind

    @property
    def row(self) -> Kind:
        """The row of its kind."""
        return KINDS[self.kind]

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of its provider."""
        return self.row.provider

    @property
    def place(self) -> tuple[str, int]:
        """ONNX Runtime's name of its memory, and the memory's index."""
        return self.row.memory, self.index

    @property
    def is_gpu(self) -> bool:
        """Whether it has its own memory."""
        return self.row.is_gpu


@dataclass(frozen=True)
class Settings:
    """The settings of a session, beyond its graph and device."""

    provider_options: Mapping[str, object] = field(default_factory=dict[str, object])  # override ours
    cuda_graphs: bool = False  # whether runs can be recorded
    precision: Precision | None = None  # of the device's arithmetic; None: as the graph says, or not yet decided
    threads: int | None = None  # CPU threads of each session; None: `thread_count()`
    cache: Path | None = None  # a directory for files that a provider compiles from this graph for this device
    record_placement: bool = False  # whether the session can list the nodes of each provider

    @property
    def cpu_threads(self) -> int:
        """Threads of the CPU for each session."""
        return self.threads or thread_count()


def _cuda(device: Device, settings: Settings) -> dict[str, str]:
    options = {
        "device_id": str(device.index),
        # By default, each extension doubles the arena, which stays allocated.
        "arena_extend_strategy": "kSameAsRequested",
        # By default, every convolution algorithm is timed at every new shape: many seconds for a UNet.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return {**options, "enable_cuda_graph": "1"} if settings.cuda_graphs else options


def _configures_openvino(given: Mapping[str, object]) -> bool:
    return "load_config" in given or given.get("device_type", "CPU") != "CPU"


def _openvino(device: Device, settings: Settings) -> dict[str, str]:
    if _configures_openvino(settings.provider_options):
        return {"device_type": "CPU"}
    # num_of_threads is not set: the provider would also prepare that many requests per graph, each with its memory.
    config = {
        # The precision is always set, because the provider's default is float32 on every CPU.
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[settings.precision or "fp32"],
        "INFERENCE_NUM_THREADS": str(settings.cpu_threads),
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": config})}


def _tensorrt(device: Device, settings: Settings) -> dict[str, str]:
    # trt_fp16_enable is not set: some parts of an fp16 bundle are in fp32 because they overflow in fp16, and it would
    # let TensorRT compute these in fp16. Without it, TensorRT keeps the types of the graph.
    # trt_profile_*_shapes are not set: they would have to name every feature between the two UNet graphs. Instead, an
    # engine covers the shapes seen so far. It is built again for any other shape. The profile is cached with it.
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


# What each extra of tiue-runtime installs, as pip takes it. These packages are on PyPI, so messages name them.
INSTALLS = {
    "cpu": "onnxruntime",
    "cuda": '"onnxruntime-gpu[cuda,cudnn]"',
    "cuda12": '"onnxruntime-gpu[cuda,cudnn]<1.27"',
    "tensorrt": '"onnxruntime-gpu[cuda,cudnn]<1.32" "tensorrt-cu13-libs<11"',
    "tensorrt-rtx": "onnxruntime onnxruntime-ep-nv-tensorrt-rtx",
    "openvino": "onnxruntime-openvino",
}

KINDS = {
    "cpu": Kind(
        "CPUExecutionProvider",
        "CPU",
        "cpu",
        gives_back="on request",
        forks=True,
        loads_at_once=2,  # Loading a graph keeps mostly one thread busy.
        variants=(CPU, PORTABLE, WEB),
        remedy="Install ONNX Runtime again",
    ),
    "openvino": Kind(
        "OpenVINOExecutionProvider",
        "OpenVINO",
        "openvino",
        gives_back="by reloading",
        options=_openvino,
        takes_over=_configures_openvino,
        precisions=("bf16", "fp32"),
        must_take_all=True,
        library="onnxruntime_providers_openvino",
        # Measured with the UNet of Stable Diffusion 2.1 and 4 steps: 15.3 s with the CPU graphs, 16.8 s on OpenVINO in
        # float32. OpenVINO also loads more slowly and takes more memory.
        slower_than=CPU,
        remedy=(
            "It needs an x86-64 CPU or, for another device_type in provider_options, such an Intel device and its "
            "driver"
        ),
    ),
    "cuda": Kind(
        "CUDAExecutionProvider",
        "CUDA",
        "cuda",
        gives_back="after each run",
        variants=(CUDA, PORTABLE),
        memory="cuda",
        options=_cuda,
        cuda_graphs=True,
        # Weights lie outside the arena, so that an arena can shrink to almost nothing after a run.
        session_entries={"session.use_device_allocator_for_initializers": "1"},
        fallback=("cpu",),
        library="onnxruntime_providers_cuda",
        remedy=(
            f"Check the NVIDIA driver (nvidia-smi) and the wheel: pip install {INSTALLS['cuda']} is for CUDA 13, "
            f"pip install {INSTALLS['cuda12']} for CUDA 12"
        ),
    ),
    # TensorRT lacks ONNX Runtime's own operators, so it cannot run the CUDA variant.
    "tensorrt": Kind(
        "TensorrtExecutionProvider",
        "TensorRT",
        "tensorrt",
        memory="cuda",
        options=_tensorrt,
        probe_options={"trt_min_subgraph_size": 1000},  # loads TensorRT, but saves the seconds of building an engine
        fallback=("cuda", "cpu"),
        compiles=True,
        library="onnxruntime_providers_tensorrt",
        preloads=("tensorrt_libs", "nvinfer", "nvonnxparser"),
        remedy=(
            "Check the NVIDIA driver (nvidia-smi) and TensorRT, whose libraries must be of the major version that the "
            f"wheel of ONNX Runtime was built with: pip install {INSTALLS['tensorrt']}"
        ),
    ),
    "tensorrt-rtx": Kind(
        "NvTensorRTRTXExecutionProvider",
        "TensorRT for RTX",
        "tensorrt-rtx",
        memory="cuda",
        options=_tensorrt_rtx,
        fallback=("cpu",),
        compiles=True,
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        remedy="It needs an RTX GPU of the 30 series or later and a driver for CUDA 13 (nvidia-smi)",
    ),
}

AUTO = ("cuda", "openvino", "cpu")  # the kinds that device="auto" tries, in this order; the last one always starts

# Provider options that follow from arguments of this package: option => argument.
OWNED = {"device_id": "device", "enable_cuda_graph": "cuda_graphs", "trt_cuda_graph_enable": "cuda_graphs"}


def parse_device(text: object) -> Device:
    """Read "cpu", "openvino", "cuda", "cuda:1" and so on.

    Raises:
        DeviceError: the text names no device.
    """
    if isinstance(text, str):
        kind, colon, index = text.partition(":")
        if kind in KINDS:
            numbered = KINDS[kind].is_gpu and index.isascii() and index.isdigit() and len(index) < 5
            if numbered or not colon:
                return Device(kind, int(index or 0))
    *first, last = ("auto", *KINDS)
    names = f"{', '.join(map(_quoted, first))} or {_quoted(last)}"
    numbered = next(_quoted(f"{kind}:1") for kind, row in KINDS.items() if row.is_gpu)
    raise DeviceError(f"device: expected {names}, a second GPU as {numbered}, got {shorten(text)}")


def _quoted(text: str) -> str:
    return f'"{text}"'


def provider_options(device: Device, settings: Settings) -> list[tuple[str, dict[str, str]]]:
    """List the providers of a session in order of preference, each with its options in ONNX Runtime's form."""
    own = {**_options_of(device, settings), **{name: _text(value) for name, value in settings.provider_options.items()}}
    others = [Device(kind, device.index if KINDS[kind].is_gpu else 0) for kind in device.row.fallback]
    return [(device.provider, own), *((other.provider, _options_of(other, Settings())) for other in others)]


def _options_of(device: Device, settings: Settings) -> dict[str, str]:
    options = device.row.options
    return {} if options is None else options(device, settings)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    return str(int(value)) if isinstance(value, bool) else str(value)
