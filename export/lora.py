"""Merging LoRAs into a model before it is exported: W + scale * alpha / rank * B A, in every layer that they change."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from export.errors import ExportError
from export.lora_file import Pair, read_lora, refuse_unused
from tiue.components import Components
from tiue.files import is_file, one_line

Layer = nn.Linear | nn.Conv2d
_PARTS = ("unet", "text_encoder")


@dataclass(frozen=True)
class Lora:
    """A file to merge, and how strongly."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class MergedLora:
    """What a bundle says about a LoRA that it contains."""

    name: str  # of the file
    scale: float
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}, scale {self.scale:g}, sha256 {self.sha256}"


def parse_lora(text: str) -> Lora:
    """Read FILE or FILE:SCALE. The colon of a Windows drive is part of FILE.

    Raises:
        ExportError: the scale is not a finite number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or is_file(Path(text)):
        return Lora(Path(text))
    try:
        number = float(scale)
    except ValueError:
        if not path.lower().endswith(".safetensors"):
            return Lora(Path(text))
        number = math.nan
    if not math.isfinite(number):
        raise ExportError(f"`lora` must be FILE or FILE:SCALE with a finite number, got {one_line(text)}")
    return Lora(Path(path), number)


def merge_lora(components: Components, lora: Lora) -> MergedLora:
    """Add a LoRA to the weights of the UNet and the text encoder, in place.

    Every tensor of the file is used, or the file is refused and no weight is changed.

    Args:
        components: the model, in float32.
        lora: a safetensors file in the layout of kohya, diffusers or peft.

    Raises:
        ExportError: the file is no LoRA, or is one for another model. The message names a tensor and both shapes.
    """
    pairs = read_lora(lora.path)
    layers = dict(_layers(components))
    strangers = [pair for name, pair in pairs.items() if name not in layers]
    tensors = [name for pair in strangers for name in (pair.down_name, pair.up_name)]
    refuse_unused(lora.path, tensors, "the model has no such layers, so the LoRA was made for another one")
    for name, pair in pairs.items():
        _check_shapes(lora.path, pair, *layers[name])
    with torch.no_grad():
        for name, pair in pairs.items():  # The products together would be as large as the model.
            weight = layers[name][1].weight
            product = pair.up.flatten(1) @ pair.down.flatten(1)
            weight += (lora.scale * pair.scale) * product.reshape(weight.shape)
    with lora.path.open("rb") as file:
        return MergedLora(one_line(lora.path.name), lora.scale, hashlib.file_digest(file, "sha256").hexdigest())


def _check_shapes(path: Path, pair: Pair, name: str, layer: Layer) -> None:
    """Raise ExportError unless the product of the factors has the shape of the layer's weight."""
    shape = tuple(layer.weight.shape)
    # 1x1 convolutions and matrices are the same. Files have the one where models have the other.
    kernel = pair.down.shape[2:] if pair.down.shape[2:].numel() > 1 else (1,) * (len(shape) - 2)
    made = (len(pair.up), pair.down.shape[1], *kernel)
    if made != shape:
        raise ExportError(
            f"{path} was made for another model: {pair.down_name} {list(pair.down.shape)} and {pair.up_name} "
            f"{list(pair.up.shape)} change weights of the shape {list(made)}, but {name} has {list(shape)}"
        )


def _layers(components: Components) -> Iterator[tuple[str, tuple[str, Layer]]]:
    """Yield every name that a LoRA may give to a layer, with the layer's own name and the layer."""
    for part in _PARTS:
        module: nn.Module = getattr(components, part)
        for path, layer in module.named_modules():
            if isinstance(layer, Layer):
                for name in _names(part, path):
                    yield name, (f"{part}.{path}", layer)


def _names(part: str, path: str) -> Iterator[str]:
    """Yield the names of a layer in LoRA files, without the names of the factors."""
    flat = path.replace(".", "_")
    yield from (f"lora_unet_{flat}",) if part == "unet" else (f"lora_te_{flat}", f"lora_te1_{flat}")
    yield f"base_model.model.{path}"
    yield f"{part}.{path}"
    yield from (_older_unet_names if part == "unet" else _older_text_encoder_names)(path)


def _older_unet_names(path: str) -> Iterator[str]:
    """Yield names without the part, and those of the attention processors of 2022."""
    yield path
    older = re.sub(r"\.to_out\.0$", ".to_out", path)
    if match := re.fullmatch(r"(.*)\.(to_(?:q|k|v|out))", older):
        yield f"{match[1]}.processor.{match[2]}"
        yield f"unet.{match[1]}.processor.{match[2]}"


def _older_text_encoder_names(path: str) -> Iterator[str]:
    """Yield the names of 2022: those of diffusers' own attention."""
    if match := re.fullmatch(r"(.*)\.(q|k|v|out)_proj", path):
        yield f"text_encoder.{match[1]}.to_{match[2]}"
