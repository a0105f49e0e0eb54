"""Where files are kept that providers compile from a bundle: TensorRT's engines take minutes to build."""

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path

from tiue_runtime.bundle import MANIFEST
from tiue_runtime.errors import DeviceError
from tiue_runtime.ort.devices import KINDS, Device, Settings
from tiue_runtime.ort.sessions import load_onnxruntime

VARIABLE = "TIUE_CACHE"


def cache_root() -> Path:
    """The directory of the environment variable TIUE_CACHE, else `tiue` in the user's cache directory."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "tiue" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/tiue"
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "tiue"  # as the XDG standard says


def with_cache(settings: Settings, device: Device, bundle: Path, graph: Path) -> Settings:
    """`settings` with a directory, made here, for what `device` compiles from one graph file of a bundle directory.

    It depends on the content of bundle.json, which holds the sha256 of every file, so another content never meets old
    engines; on the device, because engines fit one GPU; and on the version of ONNX Runtime, because they fit one
    version. Devices that compile nothing get none. Raises DeviceError.
    """
    if not KINDS[device.kind].compiles:
        return settings
    content = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    place = str(device).replace(":", "-")  # Windows has no colons in file names
    version: str = load_onnxruntime().__version__
    file = graph.relative_to(bundle).with_suffix("").as_posix().replace("/", "-")  # variants may use one name
    directory = cache_root() / "engines" / content / f"{place}-onnxruntime-{version}" / file
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(f"no place to keep compiled graphs: {error}. Set {VARIABLE} to another directory") from error
    return replace(settings, cache=directory)
