"""Reading an upscaler: a network that enlarges pictures, which spandrel recognizes by its weights."""

import contextlib
import hashlib
import importlib.util
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from export.errors import ExportError
from tiue.files import is_file, one_line
from tiue.weights import WeightsError, read_headers

SCALES = (2, 16)  # the smallest and the largest factor


class Upscaler(nn.Module):
    """An upscaler as the graph's signature."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.float().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] => (B, 3, scale * H, scale * W), the same range but for overshoots."""
        return self.network(image / 2 + 0.5) * 2 - 1


@dataclass(frozen=True)
class LoadedUpscaler:
    """An upscaler, and what a bundle says about it."""

    module: Upscaler
    scale: int
    multiple: int  # sides of its pictures are multiples of it
    origin: str  # architecture, file and sha256


def load_upscaler(path: Path) -> LoadedUpscaler:
    """Load an upscaler with spandrel.

    Raises:
        ExportError: spandrel is missing; or the file is no safetensors file, or no upscaler of RGB pictures.
    """
    if not is_file(path):
        raise ExportError(f"no such upscaler: {path}")
    try:
        tensors = read_headers(path)
    except WeightsError as error:
        raise ExportError(f"{path} {error}") from error
    if not tensors:
        raise ExportError(f"{path} holds no tensors: expected the weights of an upscaler")
    with _spandrel() as spandrel:
        try:
            found = spandrel.ModelLoader().load_from_state_dict(load_file(path))
        except spandrel.UnsupportedModelError as error:
            raise ExportError(f"{path} is no upscaler that spandrel {spandrel.__version__} knows") from error
        except Exception as error:  # Architectures raise anything for weights that make no sense.
            raise ExportError(f"{path} cannot be loaded as an upscaler: {one_line(error)}") from error
    name = found.architecture.name
    if found.purpose != "SR" or not SCALES[0] <= found.scale <= SCALES[1]:
        raise ExportError(f"{path} is a {name} that enlarges by {found.scale}: expected an upscaler, by 2 to 16")
    if (found.input_channels, found.output_channels) != (3, 3):
        channels = f"{found.input_channels} to {found.output_channels}"
        raise ExportError(f"{path} is a {name} from {channels} channels: expected one of RGB pictures, 3 to 3")
    if found.size_requirements.square:
        raise ExportError(f"{path} is a {name} of square pictures only, which is not supported")
    for key, tensor in found.model.state_dict().items():
        if not tensor.isfinite().all():
            raise ExportError(f"{path}: {key} holds infinity or NaN: the weights are damaged")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    origin = f"{name}, {one_line(path.name)}, sha256 {sha256}"
    return LoadedUpscaler(Upscaler(found.model).eval(), found.scale, found.size_requirements.multiple_of, origin)


@contextlib.contextmanager
def _spandrel() -> Generator[Any]:
    """Import spandrel, also without torchvision.

    Version 0.4 imports two functions of torchvision, for two architectures that are no upscalers (LaMa and
    RestoreFormer). With torchvision, pip would install another torch and gigabytes of CUDA.
    """
    if importlib.util.find_spec("spandrel") is None:
        raise ExportError("`upscaler` needs spandrel: pip install --no-deps spandrel==0.4.2 einops")
    placeholders: dict[str, ModuleType] = {}
    if "spandrel" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            placeholders[name] = ModuleType(name)
        placeholders[name].__dict__.update(InterpolationMode=None, rotate=None, normalize=None)
    sys.modules.update(placeholders)
    try:
        yield importlib.import_module("spandrel")
    except ImportError as error:
        raise ExportError(f"spandrel cannot be imported: {one_line(error)}") from error
    finally:
        for name in placeholders:  # Other libraries look for torchvision, and would find these.
            sys.modules.pop(name, None)
