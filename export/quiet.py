"""Silence the messages of PyTorch's and optimum's exporters that no user can act on, and nothing else."""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch

_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # torch.onnx uses its own deprecated pytree specifications.
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    # Axes that are equal by construction get one name, as intended.
    (r"# The axis name: .* will not be used", UserWarning),
    # optimum-onnx uses the TorchScript exporter, and transformers branches on shapes that are constant here.
    (r"You are using the legacy TorchScript-based ONNX export", DeprecationWarning),
    (r"The feature will be removed. Please remove usage of this function", DeprecationWarning),
    (r"", torch.jit.TracerWarning),
)
_LOGGERS = (
    "torch.onnx._internal.exporter._registration",  # "torchvision is not installed": nothing here uses it
    "diffusers.configuration_utils",  # does not expect AutoencoderTiny's own configuration
    "root",  # onnxruntime.quantization recommends a preprocessing step that changes nothing here
)


@contextmanager
def quiet() -> Generator[None]:
    """Drop the known messages within the block."""
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
