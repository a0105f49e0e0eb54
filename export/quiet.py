"""Silence what the exporters say that no user can act on, and nothing else."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch

_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # torch.onnx copies its own pytree specifications.
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    # Axes that are equal by construction get one name, which is what we ask for.
    (r"# The axis name: .* will not be used", UserWarning),
    # optimum-onnx uses the TorchScript exporter, and transformers branches on shapes that we hold constant.
    (r"You are using the legacy TorchScript-based ONNX export", DeprecationWarning),
    (r"The feature will be removed. Please remove usage of this function", DeprecationWarning),
    (r"", torch.jit.TracerWarning),  # pyright: ignore[reportPrivateImportUsage]
)
_LOGGERS = (
    "torch.onnx._internal.exporter._registration",  # "torchvision is not installed": we use none of it
    "diffusers.configuration_utils",  # AutoencoderTiny's own configuration surprises it
    "root",  # onnxruntime.quantization recommends a preprocessing step that changes nothing here
)


@contextmanager
def quiet() -> Generator[None]:
    """Within the block, drop the exporters' known chatter."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        for message, category in _WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
