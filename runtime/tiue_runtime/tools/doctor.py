"""A report of this installation: versions, devices, bundles, and the provider of each node of a bundle's graphs."""

import contextlib
import io
import os
import platform
import sys
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from tiue_runtime import __version__
from tiue_runtime.bundle import PORTABLE, Bundle
from tiue_runtime.bundle.find import find_bundle, installed_bundles
from tiue_runtime.bundle.pulled import cache_root
from tiue_runtime.errors import TiueError
from tiue_runtime.host.gpu import driver_version, find_gpus
from tiue_runtime.host.machine import thread_count
from tiue_runtime.ort.devices import INSTALLS, KINDS, Device
from tiue_runtime.ort.engines import with_cache
from tiue_runtime.ort.interrupt import interruptible
from tiue_runtime.ort.placement import Placement, place
from tiue_runtime.ort.sessions import (
    available_providers,
    create_session,
    installed_wheels,
    load_onnxruntime,
    preload_libraries,
    took_all,
)

# Prefixes of the wheels and shared libraries that ONNX Runtime uses on a GPU.
_GPU_WHEELS = ("nvidia-", "tensorrt", "onnxruntime-ep-")
_GPU_LIBRARIES = ("libcu", "libnv", "cudart", "cublas", "cufft", "cudnn", "nvcuda", "nvinfer", "nvonnxparser")

Rows = dict[str, object]


def examine(bundle: str | Path | None = None, device: str | None = None) -> tuple[Rows, list[str]]:
    """Examine this installation.

    Args:
        bundle: a directory or a name, as in `Pipeline.load`.
        device: as in `Pipeline.load`. With a bundle or a device, graphs are loaded to find the provider of each node.
            With TensorRT this takes minutes.

    Returns:
        Rows of facts to print, and a list of problems. Without problems, this installation can make pictures.
    """
    rows: Rows = {
        "tiue-runtime": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in ("numpy", "pillow", "tokenizers")),
        "onnx runtime": ", ".join(f"{n} {v}" for n, v in installed_wheels().items()) or "not installed",
        "telemetry": _telemetry(),
        "cpu threads": thread_count(),
        **_gpu_rows(),
    }
    problems: list[str] = []
    try:
        rows |= _provider_rows()
    except TiueError as error:
        problems.append(str(error))
    for name in installed_bundles():
        try:
            found = Bundle.load(find_bundle(name))
            rows[f"bundle {name}"] = f"{found.directory} ({found.manifest.license})"
        except TiueError as error:
            problems.append(str(error))
    chosen = None
    try:
        chosen = Bundle.load(find_bundle(bundle))
    except TiueError as error:
        problems.append(str(error))
    if bundle is None:
        rows["default bundle"] = chosen.directory if chosen else "none, see below"
    variants = chosen.manifest.variants if chosen else (PORTABLE,)
    try:
        auto = place(variants=variants)
        rows["device auto"] = auto.device
        if chosen and (bundle is not None or device is not None):
            rows |= _placement_rows(chosen, auto if device is None else place(device, variants))
    except TiueError as error:
        problems.append(str(error))
    return rows, list(dict.fromkeys(problems))


def _telemetry() -> str:
    """Say whether ONNX Runtime may report its use. This package turns that off, unless the user turned it on."""
    value = os.environ.get("ORT_DISABLE_TELEMETRY", "")
    off = value.lower() in ("1", "true", "yes", "on")  # ONNX Runtime reads any other value as no
    return f"{'off' if off else 'ON'}, by ORT_DISABLE_TELEMETRY={value}"


def _gpu_rows() -> Rows:
    gpus = find_gpus()
    if isinstance(gpus, str):
        return {"gpu": f"none found: {gpus}"}
    rows: Rows = {
        f"gpu {i}": f"{gpu.name}, {gpu.memory / 2**30:.1f} GiB, compute capability {'.'.join(map(str, gpu.capability))}"
        for i, gpu in enumerate(gpus)
    }
    wheels = sorted({f"{d.name} {d.version}" for d in distributions() if str(d.name).lower().startswith(_GPU_WHEELS)})
    return rows | {"gpu driver": driver_version() or "unknown", "gpu wheels": ", ".join(wheels) or "none"}


def _provider_rows() -> Rows:
    """Return a row for each kind of device, and one for all other providers. Raises DeviceError."""
    ort, available = load_onnxruntime(), available_providers()
    rows: Rows = {}
    gpus = [Device(name) for name, kind in KINDS.items() if kind.is_gpu and kind.library and kind.provider in available]
    if gpus:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            for device in gpus:
                preload_libraries(ort, device)
        messages = dict.fromkeys(line.strip() for line in said.getvalue().splitlines() if line.strip())
        rows["preloaded"] = "; ".join([", ".join(_loaded_libraries()) or "nothing", *messages])
    for name, kind in KINDS.items():
        row = f"provider {name}"
        if kind.provider not in available:
            rows[row] = f"no: {kind.provider} is not installed; {INSTALLS[kind.extra]} brings it"
            continue
        try:
            precision = place(name, kind.variants).precision
        except TiueError as error:
            rows[row] = f"no: {error}"
        else:
            rows[row] = f"yes: {kind.provider} starts{f' and computes in {precision}' if precision else ''}"
    others = [provider for provider in available if provider not in {kind.provider for kind in KINDS.values()}]
    return rows | ({"other providers": f"{', '.join(others)} (built in, not used)"} if others else {})


def _loaded_libraries() -> list[str]:
    """List the file names of the CUDA, cuDNN and TensorRT libraries in this process. Known on Linux only."""
    maps = Path("/proc/self/maps")
    if not (sys.platform.startswith("linux") and maps.is_file()):
        return ["not reported by this system"]
    columns = [line.split(maxsplit=5) for line in maps.read_text("utf-8", "replace").splitlines()]
    names = {Path(values[5]).name for values in columns if len(values) > 5}
    return sorted(name for name in names if name.startswith(_GPU_LIBRARIES))


def _placement_rows(bundle: Bundle, placement: Placement) -> Rows:
    """Count the nodes of each graph by their provider. Raises BundleError, DeviceError."""
    manifest, device = bundle.manifest, placement.device
    computed = f" in {placement.precision}" if placement.precision else ""
    rows: Rows = {"placement of": f"{manifest.name}, {placement.variant} graphs, on {device}{computed}"}
    if device.row.compiles:
        rows["compiled graphs"] = f"kept below {cache_root()}"
    for graph in manifest.graphs:
        path = bundle.graph_path(graph, placement.variant)
        settings = with_cache(replace(placement.settings, record_placement=True), device, bundle.directory, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # The rows already show nodes on the CPU.
            session = interruptible(partial(create_session, path, device, settings), f"loading {graph}")
        rows[f"nodes of {graph}"] = count_nodes(session, device)
    return rows


def count_nodes(session: Any, device: Device) -> str:
    """Count a session's nodes: "CUDAExecutionProvider 540, CPUExecutionProvider 5 (3 Gather, 2 Shape)"."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        if not device.row.must_take_all:
            return "not reported by this version of ONNX Runtime"
        part = "all" if took_all(session) else "not all"
        return f"{part} on {device.provider}; not counted by this version of ONNX Runtime"
    nodes: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        nodes.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    texts: list[str] = []
    for provider, operators in sorted(nodes.items(), key=lambda item: item[0] != device.provider):
        text = f"{provider} {operators.total()}"
        if provider != device.provider:  # These nodes were left by the device.
            text += f" ({', '.join(f'{count} {name}' for name, count in operators.most_common())})"
        texts.append(text)
    return ", ".join(texts)
