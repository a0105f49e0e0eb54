"""Make images from a TiUE bundle with ONNX Runtime: no torch, no sampling loop.

    from tiue_runtime import generate
    generate("a red heart", seed=1)[0].save("heart.png")

Names are imported when they are first used, so `import tiue_runtime` is quick and loads no ONNX Runtime.

The modules, in the order in which a request meets them:
    kept_pipelines  `generate`, with pipelines that stay loaded
    pipeline        Pipeline: the public face of a loaded bundle
    aio             pictures for asyncio
    options, choices    the options of a request and of loading, each written once
    request         the options of one request, checked and complete
    tokenizer, vocabulary, noise    a prompt's tokens and unknown words; a seed's noise z_T
    sampler         from a request to pictures: text, latents, pixels
    denoise         the method: the encoder once, the decoder at N timesteps, z_0 = w_0 z_T + sum_i w_i eps_i
    graphs          the four graphs: loaded, run in turn, freed
    decode, tiling, images    z_0 to pixels, whole or in tiles
    modes, budget   how many timesteps at once; whether a run fits into memory
    run, progress   progress, timings and cancelling of one request
    result, saving  pictures and how they were made; their files
    contact_sheet, notebook     one picture that shows them all; results and progress in notebooks
    record, metadata, repeating, credentials    what a file says about its picture; making it again; signatures
    preview, errors         small pictures of latents; exceptions

`bundle` is the contract with the exporter. `ort` wraps ONNX Runtime. `host` describes this computer. `hub` pulls and
signs bundles. `tools` holds the command line.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiue_runtime.bundle import Bundle
    from tiue_runtime.errors import (
        BundleError,
        Cancelled,
        DeviceError,
        InferenceError,
        OutOfMemoryError,
        RequestError,
        TiueError,
    )
    from tiue_runtime.kept_pipelines import generate
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.progress import Progress
    from tiue_runtime.record import Record
    from tiue_runtime.result import Result
    from tiue_runtime.saving import read_record

__version__ = "0.1.0"

# ONNX Runtime 1.29 and later start a telemetry client when they are imported: it looks up a host and writes files into
# the user's cache. This must be set before that import. A value that the user has set stays.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"

__all__ = [
    "Bundle",
    "BundleError",
    "Cancelled",
    "DeviceError",
    "InferenceError",
    "OutOfMemoryError",
    "Pipeline",
    "Progress",
    "Record",
    "RequestError",
    "Result",
    "TiueError",
    "__version__",
    "generate",
    "read_record",
]

_MODULES = {
    "Bundle": "bundle",
    "Pipeline": "pipeline",
    "Progress": "progress",
    "Record": "record",
    "Result": "result",
    "generate": "kept_pipelines",
    "read_record": "saving",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
