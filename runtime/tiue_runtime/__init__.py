"""Make images from a TiUE bundle with ONNX Runtime: no torch, no sampling loop.

    from tiue_runtime import generate
    generate("a red heart", seed=1)[0].save("heart.png")

Names are imported when they are first used, so `import tiue_runtime` is quick and loads no ONNX Runtime.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle import Bundle
    from .errors import (
        BundleError,
        Cancelled,
        DeviceError,
        InferenceError,
        OutOfMemoryError,
        RequestError,
        TiueError,
    )
    from .pipeline import Pipeline, Result, generate

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "BundleError",
    "Cancelled",
    "DeviceError",
    "InferenceError",
    "OutOfMemoryError",
    "Pipeline",
    "RequestError",
    "Result",
    "TiueError",
    "__version__",
    "generate",
]

_MODULES = {"Bundle": "bundle", "Pipeline": "pipeline", "Result": "pipeline", "generate": "pipeline"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
