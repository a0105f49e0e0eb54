"""What is trained: drawings find their concept among all concepts, and their style among all styles.

The texts are those of a fixed text encoder, so all concepts are negatives of every drawing, not only those of a batch:

    loss = CE(e . w_k / tau over all concepts k) + lambda CE(e . w_{concept, s} / tau over all styles s)

Here e is a drawing's embedding, and w_k the embedding of a random caption of concept k. w_{k, s} is that of its label
with the word of style s. Convolutions and matrices are trained with Muon, all else with AdamW.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.encoder.augment import augment, may_be_mirrored
from evaluation.encoder.encoder_config import EncoderConfig
from evaluation.encoder.network import Encoder, save_encoder, to_pixels
from evaluation.encoder.sentences import Sentences
from evaluation.reference import Reference
from tiue.distill.draws import Batch
from tiue.distill.method import Means, Method, Run, Trained
from tiue.distill.optimizers import make_muon

_SALT = "evaluation"  # makes the split another one than that of any model that is judged


def held_out(reference: Reference) -> NDArray[np.bool_]:
    """Choose a fixed tenth of the (concept, style) pairs by hash, (n,)."""
    return np.array(
        [
            hashlib.sha256(f"{_SALT}/{reference.captions[c][0]}/{reference.styles[s]}".encode()).digest()[0] * 10 < 256
            for c, s in zip(reference.concept, reference.style, strict=True)
        ]
    )


class Texts:
    """The text encoder's vectors of all captions, and of all labels with all styles.

    Attributes:
        captions: float32 (captions, 384), concept by concept. The first of a concept is its label.
        first, count: int64 (K,), where each concept's captions begin, and how many there are.
        styled: float32 (K, styles, 384).
    """

    def __init__(self, reference: Reference, sentences: Sentences):
        self.count = torch.tensor([len(variants) for variants in reference.captions])
        self.first = self.count.cumsum(0) - self.count
        self.captions = sentences([text for variants in reference.captions for text in variants])
        styled = [styled_text(variants[0], style) for variants in reference.captions for style in reference.styles]
        self.styled = sentences(styled).view(len(self.count), len(reference.styles), -1)


def styled_text(text: str, style: str) -> str:
    """Add the word of a style to a caption, as the captions of the drawings have it."""
    return f"{text}, {style} style"


class Contrast(nn.Module):
    """The loss of a batch, as a module, so that processes exchange gradients."""

    def __init__(self, encoder: Encoder, reference: Reference, texts: Texts, config: EncoderConfig):
        super().__init__()
        self.encoder = encoder
        self._texts, self._config = texts, config
        self._rows = torch.from_numpy(np.flatnonzero(~held_out(reference)))
        self._pictures = reference.pictures
        self._concept = torch.from_numpy(reference.concept)
        self._style = torch.from_numpy(reference.style)
        self._mirror = torch.tensor([may_be_mirrored(variants[0]) for variants in reference.captions])

    def forward(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Draw `count` drawings => the losses over concepts and over styles."""
        rows = self._rows[torch.randint(len(self._rows), (count,), generator=generator)]
        concept, style = self._concept[rows], self._style[rows]
        size = self.encoder.shape.resolution
        pixels = augment(to_pixels(self._pictures[rows.numpy()], (size, size)), self._mirror[concept], generator)
        device = self.encoder.device
        embedding = self.encoder.embed_pixels(pixels.to(device, memory_format=torch.channels_last))
        words = self.encoder.embed_vectors(self._captions(generator).to(device))
        styled = self.encoder.embed_vectors(self._texts.styled[concept].to(device))
        scale = self.encoder.log_scale.clamp(max=4.6).exp()  # at most 100, as in CLIP
        by_concept = F.cross_entropy(
            scale * embedding @ words.T, concept.to(device), label_smoothing=self._config.smoothing
        )
        by_style = F.cross_entropy(scale * (styled @ embedding[..., None]).squeeze(-1), style.to(device))
        return by_concept, by_style

    def _captions(self, generator: torch.Generator) -> Tensor:
        """The vectors of one caption of every concept, (K, 384)."""
        texts = self._texts
        any_one = (torch.rand(len(texts.count), generator=generator) * texts.count).long()
        label = torch.rand(len(texts.count), generator=generator) < self._config.label_share
        return texts.captions[texts.first + torch.where(label, 0, any_one)]


class EncoderTraining(Method):
    """Trains an encoder on the drawings that are not held out.

    Args:
        run: the run.
        config: the settings.
        reference: drawings with concepts, styles and captions.
        texts: their texts.
    """

    name = "encoder"
    result = "encoder.safetensors"
    columns = ("concept", "style", "scale")

    def __init__(self, run: Run, config: EncoderConfig, reference: Reference, texts: Texts):
        torch.manual_seed(config.seed)
        encoder = Encoder(config.shape, config.temperature).to(
            run.accelerator.device, memory_format=torch.channels_last
        )
        self.model, self._config = encoder.train(), config
        objective = Contrast(encoder, reference, texts, config)
        rates = config.learning_rate, config.adam_learning_rate
        optimizer = make_muon(encoder, *rates, mixed_precision=config.mixed_precision)
        self._objective = Trained(run.accelerator, objective, optimizer, config.grad_clip)
        self.networks = {"encoder": self._objective}

    def update(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Update the encoder once."""
        means = Means()
        for part in self._objective.accumulating(batch.parts):
            concept, style = self._objective(part.generator, part.size)
            self._objective.backward((concept + self._config.style_weight * style) / len(batch.parts))
            means.add(len(batch.parts), concept=concept, style=style, scale=self.model.log_scale.exp())
        self._objective.step()
        return means.values

    def save(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write the encoder."""
        save_encoder(path, self._config.shape, weights)
