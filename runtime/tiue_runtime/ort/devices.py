"""Devices: the strings that name them, the ONNX Runtime providers behind them, and the options that they get.

A kind of device is a row of `KINDS`. No code outside this module compares kinds: it asks the row. Another provider
(DirectML) is one more row.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tiue_runtime.bundle import CPU, CUDA, PORTABLE
from tiue_runtime.errors import DeviceError, shorten
from tiue_runtime.host.machine import thread_count

Precision = Literal["bf16", "fp32"]
GivesBack = Literal["on request", "after each run", "by reloading", "never"]
Loads = Literal["side by side", "one by one"]
Proof = Literal["session", "product"]

_AT_ONCE: dict[Loads, int] = {"side by side": 2, "one by one": 1}


@dataclass(frozen=True)
class Kind:
    """A kind of device, as data.

    Three policies tell how the rest of the package treats it:

    gives_back: how a session gives back the memory that a run took. "on request": by an option of that run.
        "after each run": by the same option, on every run. "by reloading": only by loading the graph again.
        "never": not at all.
    loads: how the graphs of a bundle are loaded. "side by side": two at a time. "one by one": each alone.
    proof: how the device is proven. "session": a session of one node must start on it. "product": a matrix product
        must also show the precision in which it computes.
    """

    provider: str  # ONNX Runtime's name
    title: str  # for people
    extra: str  # the extra of tiue-runtime that installs it
    gives_back: GivesBack = "never"
    loads: Loads = "one by one"
    proof: Proof = "session"
    variants: tuple[str, ...] = (PORTABLE,)  # the variants of a bundle that it can run, the best first
    memory: str = "cpu"  # ONNX Runtime's name of the memory that holds its tensors
    options: "Callable[[Device, Settings], dict[str, str]] | None" = None  # None: the provider takes no options
    # Whether a caller's provider options replace those that follow from precision and threads.
    takes_over: Callable[[Mapping[str, object]], bool] = lambda given: False
    precisions: tuple[Precision, ...] = ()  # that a caller may choose; none: it computes as graphs are written
    cuda_graphs: bool = False  # whether runs can be recorded
    session_entries: Mapping[str, str] = field(default_factory=dict[str, str])  # of ONNX Runtime's session options
    probe_options: Mapping[str, object] = field(default_factory=dict[str, object])  # of the session that proves it
    fallback: tuple[str, ...] = ()  # kinds that take the nodes for which it has no kernel, in this order
    must_take_all: bool = (
        False  # whether it has kernels for all our nodes, so that a node on the CPU is worth a warning
    )
    compiles: bool = False  # whether it makes files of a graph that are worth keeping
    library: str = ""  # the provider's file in ONNX Runtime's wheel, without prefix and suffix
    preloads: tuple[str, ...] = ()  # a package, and the libraries in it that must be loaded before, in this order
    plugin: str = ""  # module of the wheel that brings the provider, where ONNX Runtime's own wheels do not
    slower_than: str = ""  # a variant: ONNX Runtime's CPU provider runs it faster than this kind does without bf16
    remedy: str = ""  # for a device that does not start

    @property
    def is_gpu(self) -> bool:
        """Whether its memory is not the CPU's. Devices of such a kind are numbered."""
        return self.memory != "cpu"

    @property
    def loads_at_once(self) -> int:
        """How many graphs of a bundle are loaded at the same time."""
        return _AT_ONCE[self.loads]


@dataclass(frozen=True)
class Device:
    """Where graphs run. `str(device)` is what a caller may pass to ask for it again."""

    kind: str  # a key of KINDS
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.index else self.kind

    @property
    def row(self) -> Kind:
        """What is known of its kind."""
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
        """Whether its memory is not the CPU's."""
        return self.row.is_gpu


@dataclass(frozen=True)
class Settings:
    """How a session is set up, beyond its graph and device."""

    provider_options: Mapping[str, object] = field(default_factory=dict[str, object])  # win over those chosen here
    cuda_graphs: bool = False  # whether runs can be recorded
    precision: Precision | None = None  # that the device computes in; None: as graphs are written, or not yet decided
    threads: int | None = None  # of the CPU, for each session; None is `thread_count()`
    cache: Path | None = None  # a directory for files that a provider compiles from this graph for this device
    record_placement: bool = False  # whether the session can tell which provider got which node

    @property
    def cpu_threads(self) -> int:
        """Threads of the CPU for each session."""
        return self.threads or thread_count()


def _cuda(device: Device, settings: Settings) -> dict[str, str]:
    options = {
        "device_id": str(device.index),
        # The default doubles the arena with each extension, and a session keeps its arena.
        "arena_extend_strategy": "kSameAsRequested",
        # The default times every algorithm of every convolution at every new shape: many seconds for a UNet.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return {**options, "enable_cuda_graph": "1"} if settings.cuda_graphs else options


def _configures_openvino(given: Mapping[str, object]) -> bool:
    return "load_config" in given or given.get("device_type", "CPU") != "CPU"


def _openvino(device: Device, settings: Settings) -> dict[str, str]:
    if _configures_openvino(settings.provider_options):
        return {"device_type": "CPU"}
    # No num_of_threads: the provider would also prepare that many requests for each graph, each with its memory.
    config = {
        # Always given, because the provider's own default is float32 on every CPU.
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[settings.precision or "fp32"],
        "INFERENCE_NUM_THREADS": str(settings.cpu_threads),
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": config})}


def _tensorrt(device: Device, settings: Settings) -> dict[str, str]:
    # No trt_fp16_enable: it would let TensorRT lower those parts of an fp16 bundle that are in fp32 because they
    # overflow in fp16. Without it, the types are those written in the graph.
    # No trt_profile_*_shapes: they would have to name every feature between the two UNet graphs. Instead, an engine
    # covers the shapes seen so far, and is built again for a shape outside. The profile is cached with it.
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


KINDS = {
    "cpu": Kind(
        "CPUExecutionProvider",
        "CPU",
        "cpu",
        gives_back="on request",
        loads="side by side",  # because to load a graph is mostly the work of one thread
        variants=(CPU, PORTABLE),
        remedy="Install ONNX Runtime again",
    ),
    "openvino": Kind(
        "OpenVINOExecutionProvider",
        "OpenVINO",
        "openvino",
        gives_back="by reloading",
        proof="product",
        options=_openvino,
        takes_over=_configures_openvino,
        precisions=("bf16", "fp32"),
        must_take_all=True,
        library="onnxruntime_providers_openvino",
        # The UNet of Stable Diffusion 2.1, 4 steps: 15.3 s with its CPU graphs, 16.8 s on OpenVINO in float32, which
        # also loads more slowly and takes more memory.
        slower_than=CPU,
        remedy=(
            "It needs an x86-64 CPU or, for another device_type in provider_options, such a device of Intel's and its "
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
        # Weights outside the arena, so that an arena shrunk after a run holds little more than them.
        session_entries={"session.use_device_allocator_for_initializers": "1"},
        fallback=("cpu",),
        library="onnxruntime_providers_cuda",
        remedy=(
            'Check the NVIDIA driver (nvidia-smi) and the wheel: "tiue-runtime[cuda]" is for CUDA 13, '
            '"tiue-runtime[cuda12]" for CUDA 12'
        ),
    ),
    # TensorRT has none of the operators that only ONNX Runtime has, so the CUDA variant is not for it.
    "tensorrt": Kind(
        "TensorrtExecutionProvider",
        "TensorRT",
        "tensorrt",
        memory="cuda",
        options=_tensorrt,
        probe_options={"trt_min_subgraph_size": 1000},  # to load TensorRT, but build no engine of one node, in seconds
        fallback=("cuda", "cpu"),
        compiles=True,
        library="onnxruntime_providers_tensorrt",
        preloads=("tensorrt_libs", "nvinfer", "nvonnxparser"),
        remedy=(
            "Check the NVIDIA driver (nvidia-smi) and TensorRT, whose libraries must be of the major version that the "
            'wheel of ONNX Runtime was built with: pip install "tiue-runtime[tensorrt]"'
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

# Options that follow from other arguments, by the argument.
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
    """List the providers of a session in order of preference, each with its options as ONNX Runtime takes them."""
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
