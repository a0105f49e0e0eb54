"""The network: pictures and texts => embeddings in one space, where the cosine says what belongs together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.encoder.encoder_config import Shape
from evaluation.encoder.sentences import WIDTH, Sentences
from tiue.files import one_line, written_whole

_GROUPS = 8  # of each GroupNorm
_BATCH = 128


class Encoder(nn.Module):
    """Pictures and texts => embeddings of length 1.

    Args:
        shape: its sizes.
        temperature: the divisor of cosines in the loss. It is trained.
    """

    def __init__(self, shape: Shape, temperature: float = 0.07):
        super().__init__()
        self.shape = shape
        stages: list[nn.Module] = []
        for narrow, wide in pairwise((3, *shape.widths)):
            norm = [] if narrow == 3 else [nn.GroupNorm(_GROUPS, narrow), nn.SiLU()]
            stages += [*norm, nn.Conv2d(narrow, wide, 3, 2, 1), _Block(wide)]
        self.body = nn.Sequential(*stages, nn.GroupNorm(_GROUPS, shape.widths[-1]), nn.SiLU())
        self.head = nn.Linear(shape.widths[-1], shape.embedding)
        self.text = nn.Sequential(
            nn.Linear(WIDTH, shape.text_hidden), nn.SiLU(), nn.Linear(shape.text_hidden, shape.embedding)
        )
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, resolution, resolution) in [-1, 1] => embeddings (B, D)."""
        return F.normalize(self.head(self.body(pixels).mean(dim=(2, 3))).float(), dim=1)

    def embed_vectors(self, vectors: Tensor) -> Tensor:
        """Vectors of the text encoder (..., 384) => embeddings (..., D)."""
        return F.normalize(self.text(vectors).float(), dim=-1)

    @torch.no_grad()
    def embed_pictures(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures uint8 (n, H, W, 3) of any size => embeddings (n, D)."""
        size = (self.shape.resolution, self.shape.resolution)
        parts = [self.embed_pixels(to_pixels(part, size).to(self.device)).cpu() for part in _parts(pictures)]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], sentences: Sentences) -> NDArray[np.float32]:
        """Texts => embeddings (n, D)."""
        return self.embed_vectors(sentences(texts).to(self.device)).cpu().numpy()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.log_scale.device


class _Block(nn.Module):
    """A residual block, the identity before training."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(_GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1))
        self.second = nn.Sequential(nn.GroupNorm(_GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1))
        nn.init.zeros_(self.second[2].weight)
        nn.init.zeros_(self.second[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


def to_pixels(pictures: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """Pictures uint8 (n, H, W, 3) => pixels float32 (n, 3, *size) in [-1, 1]."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    if pixels.shape[2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)


def save_encoder(path: Path, shape: Shape, weights: Mapping[str, Tensor]) -> None:
    """Write an encoder in float16, with its sizes."""
    with written_whole(path) as temporary:
        save_file(
            {name: tensor.half().contiguous() for name, tensor in weights.items()},
            temporary,
            {"shape": json.dumps(asdict(shape))},
        )


def load_encoder(path: Path) -> Encoder:
    """Read an encoder, in float32 and evaluation mode.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            shape = json.loads((file.metadata() or {})["shape"])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        encoder = Encoder(Shape(**shape | {"widths": tuple(shape["widths"])}))
        encoder.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected an encoder of python -m evaluation.encoder: {one_line(error)}") from error
    return encoder.eval()


def _parts(pictures: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH)]
