"""Frozen networks that look at pictures, for the adversarial loss and for the alignment of pictures with captions.

They must be other networks than those that judge the pictures later. A method that is trained with its judge wins.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Model

from evaluation.encoder.network import Encoder, load_encoder
from evaluation.encoder.sentences import Sentences
from evaluation.features import load_network, load_processor
from tiue.components import Components, decode_latents
from tiue.files import fingerprint
from tiue.losses import clip_loss

_DINO_LAYERS = 4  # hidden states that the critic sees, evenly from all


class Observer(Protocol):
    """A frozen network whose inner features a critic judges.

    Attributes:
        widths: channels of the features.
        embedding: length of the embedding of a whole picture.
        fingerprint: of its weights. A run resumes only with the same.
    """

    widths: list[int]
    embedding: int
    fingerprint: str

    def look(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Look at pixels (B, 3, H, W) in [-1, 1]. Gradients pass through.

        Returns:
            Features of several depths, each (B, width, positions), and the embedding of the whole picture (B, D).
        """
        ...


class EncoderObserver:
    """The encoder of python -m evaluation.encoder.

    Args:
        path: its file.
        device: where it computes.
    """

    def __init__(self, path: Path, device: torch.device):
        self._encoder: Encoder = load_encoder(path).to(device).requires_grad_(False)
        self.widths, self.embedding = list(self._encoder.shape.widths), self._encoder.shape.embedding
        self.fingerprint = fingerprint(self._encoder)

    def look(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """See `Observer`."""
        found, hidden = [], resized(pixels, self._encoder.shape.resolution)
        for module in self._encoder.body:
            if isinstance(module, nn.GroupNorm):  # It follows every block.
                found.append(hidden.flatten(2))
            hidden = module(hidden)
        return found, F.normalize(self._encoder.head(hidden.mean(dim=(2, 3))), dim=1)


class DinoObserver:
    """DINOv2 (arXiv 2304.07193), as in ADD.

    Args:
        directory: a model saved by transformers, with its preprocessor.
        device: where it computes.

    Raises:
        ValueError: the directory holds something else.
    """

    def __init__(self, directory: Path, device: torch.device):
        network, processor = load_network(Dinov2Model, directory), load_processor(directory)
        self._network = network.requires_grad_(False).to(device)
        crop = getattr(processor, "crop_size", None)
        if crop is None:
            raise ValueError(f"{directory}: expected a preprocessor that crops, as DINOv2's does")
        self._size = crop["height"] if isinstance(crop, dict) else crop.height
        self._mean, self._deviation = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (processor.image_mean, processor.image_std)
        )
        depth, width = network.config.num_hidden_layers, network.config.hidden_size
        count = min(_DINO_LAYERS, depth)
        self._layers = [(i + 1) * depth // count for i in range(count)]
        self.widths, self.embedding, self.fingerprint = [width] * count, width, fingerprint(network)

    def look(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """See `Observer`."""
        unit = resized(pixels, self._size) / 2 + 0.5
        answer = self._network((unit - self._mean) / self._deviation, output_hidden_states=True)
        return [answer.hidden_states[layer].transpose(1, 2) for layer in self._layers], answer.pooler_output


class EncoderAlignment:
    """The clamped CLIP loss with the encoder of python -m evaluation.encoder in the place of CLIP.

    Args:
        path: its file.
        components: the model whose VAE decodes latents.
        margin: the mean cosine at which the loss ends.
    """

    def __init__(self, path: Path, components: Components, margin: float):
        self._encoder, self._margin = load_encoder(path).requires_grad_(False), margin
        self._vae = copy.deepcopy(components.vae).requires_grad_(False)  # The sample grids move the model's own.
        self._sentences: Sentences | None = None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of both networks."""
        return fingerprint(self._encoder, self._vae)

    def to(self, device: torch.device) -> EncoderAlignment:
        """Move both networks."""
        self._encoder.to(device)
        self._vae.to(device)
        self._sentences = Sentences(device)
        return self

    def loss(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compute `losses.clip_loss` of latents (B, C, h, w) and their captions, a scalar."""
        assert self._sentences is not None, "call `to` first"
        pixels = decode_latents(self._vae, latents).float()
        images = self._encoder.embed_pixels(resized(pixels, self._encoder.shape.resolution))
        with torch.no_grad():
            text = self._encoder.embed_vectors(self._sentences(prompts).to(latents.device))
        return clip_loss(text, images, self._margin)


def load_observer(path: Path, device: torch.device) -> Observer:
    """Load an observer: an encoder's file, or the directory of a DINOv2 model. Raises ValueError."""
    return DinoObserver(path, device) if path.is_dir() else EncoderObserver(path, device)


def resized(pixels: Tensor, size: int) -> Tensor:
    """Scale pixels (B, 3, H, W) to (B, 3, size, size)."""
    if pixels.shape[2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
