"""How good are pictures? The encoder of `evaluation` names their concept, and its features give a distance.

Text-to-image models are compared by CLIP score and FID. Both networks are made for photographs of 200 pixels and more.
These are their small counterparts. Retrieval: does the picture show what was asked? Frechet distance: do the pictures
resemble the drawings as a set, in quality and in variety?
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evaluation.encoder.contrastive import EncoderTraining, Texts, held_out
from evaluation.encoder.network import Encoder, load_encoder
from evaluation.encoder.retrieval import concept_embeddings, train_encoder
from evaluation.encoder.sentences import Sentences
from evaluation.metrics import frechet, rank_of_asked
from evaluation.reference import Reference
from recipes.emoji.data import STYLES, Drawings
from recipes.emoji.presets import Preset
from recipes.emoji.stage import device, precision


@dataclass(frozen=True)
class Judge:
    """An encoder, what it makes of all concepts, and its features of all drawings."""

    encoder: Encoder
    concepts: np.ndarray  # (K, D)
    real: np.ndarray  # (n, D)
    unseen: np.ndarray  # bool (n,), the drawings that the encoder was not trained on

    def measure(self, images: np.ndarray, concept: np.ndarray) -> dict[str, float]:
        """Measure pictures uint8 (n, H, W, 3) that were asked for `concept` (n,).

        Returns:
            top1 and top5, the fractions of pictures whose concept is found; and frechet, the distance to all drawings.
        """
        features = self.encoder.embed_pictures(images)
        ranks = rank_of_asked(features, self.concepts, concept)
        return {
            "top1": float((ranks < 1).mean()),
            "top5": float((ranks < 5).mean()),
            "frechet": frechet(self.real, features),
        }


def load_judge(preset: Preset, drawings: Drawings, out: Path) -> Judge:
    """Train the encoder in `out` (once), with a split of its own, and load it."""
    reference = Reference(drawings.images, drawings.concept, drawings.style, drawings.captions, list(STYLES))
    texts = Texts(reference, Sentences(device()))
    train_encoder(reference, out, replace(preset.encoder, mixed_precision=precision()), texts)
    encoder = load_encoder(out / EncoderTraining.result).to(device())
    return Judge(
        encoder, concept_embeddings(encoder, texts), encoder.embed_pictures(drawings.images), held_out(reference)
    )
