"""The directories of files that providers compile from a bundle. TensorRT's engines take minutes to build."""

import hashlib
from dataclasses import replace
from pathlib import Path

from tiue_runtime.bundle import MANIFEST
from tiue_runtime.bundle.pulled import CACHE_VARIABLE, cache_root
from tiue_runtime.errors import DeviceError
from tiue_runtime.ort.devices import Device, Settings
from tiue_runtime.ort.sessions import load_onnxruntime


def with_cache(settings: Settings, device: Device, bundle: Path, graph: Path) -> Settings:
    """Create a directory for the files that `device` compiles from one graph, and add it to `settings`.

    The path depends on the content of bundle.json, which holds the sha256 of every file. New content therefore never
    meets old engines. The path also depends on the device and on the version of ONNX Runtime, because engines fit only
    these. Devices that compile nothing get no directory.

    Args:
        settings: of a session.
        device: of the session.
        bundle: the directory of the bundle.
        graph: a graph file in it.

    Returns:
        The new settings.

    Raises:
        DeviceError: the directory cannot be made.
    """
    if not device.row.compiles:
        return settings
    content = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    place = str(device).replace(":", "-")  # Windows allows no colons in file names.
    version: str = load_onnxruntime().__version__
    file = graph.relative_to(bundle).with_suffix("").as_posix().replace("/", "-")  # Variants may share file names.
    try:
        directory = cache_root() / "engines" / content / f"{place}-onnxruntime-{version}" / file
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(
            f"no place to keep compiled graphs: {error}. Set {CACHE_VARIABLE} to another directory"
        ) from error
    return replace(settings, cache=directory)
