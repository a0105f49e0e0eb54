"""The optional CLIP loss: pictures, decoded by a tiny autoencoder, should match their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizerFast

from tiue.components import decode_latents, load_tiny_vae
from tiue.files import fingerprint, one_line
from tiue.loading import load_part
from tiue.losses import CLIP_MARGIN, clip_loss

# Mean and standard deviation of red, green and blue in CLIP's training pictures.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class Alignment(Protocol):
    """A frozen network that says how well pictures match their captions.

    Attributes:
        fingerprint: of its weights. A run resumes only with the same.
    """

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def to(self, device: torch.device) -> Any:
        """Move it, and return it."""
        ...

    def loss(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return a loss of latents (B, C, h, w) and their captions, a scalar. Gradients pass into the latents."""
        ...


class ClipScore(Alignment):
    """CLIP and the image decoder that makes pictures for it, both frozen.

    Args:
        model: embeds pictures and texts in the same space.
        tokenizer: of the model.
        vae: decodes latents to RGB in [-1, 1]. Gradients pass through it.
        margin: the mean cosine at which the loss ends.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizerFast, vae: AutoencoderTiny, margin: float = CLIP_MARGIN
    ):
        self._model, self._vae = model.eval().requires_grad_(False), vae.eval().requires_grad_(False)
        self._tokenizer, self._margin = tokenizer, margin
        size = model.config.vision_config.image_size
        self._size = (size, size)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of both networks."""
        return fingerprint(self._model, self._vae)

    def to(self, device: torch.device) -> ClipScore:
        """Move both networks."""
        self._model.to(device)
        self._vae.to(device)
        return self

    def loss(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Compute `losses.clip_loss` of latents (B, C, h, w) and their captions, a scalar."""
        pixels = decode_latents(self._vae, latents).float() / 2 + 0.5
        pixels = F.interpolate(pixels, self._size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, deviation = (torch.tensor(c, device=pixels.device).view(3, 1, 1) for c in (_MEAN, _DEVIATION))
        images = self._model.get_image_features((pixels - mean) / deviation)
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(latents.device)
        with torch.no_grad():
            text = self._model.get_text_features(tokens.input_ids, tokens.attention_mask)
        return clip_loss(text.float(), images.float(), self._margin)


def load_clip(directory: Path, tiny_vae: Path, margin: float = CLIP_MARGIN) -> ClipScore:
    """Load CLIP and an AutoencoderTiny, from safetensors only.

    Args:
        directory: a CLIP model saved by transformers.
        tiny_vae: an AutoencoderTiny saved by diffusers.
        margin: the mean cosine at which the loss ends.

    Returns:
        The CLIP loss.

    Raises:
        ValueError: a directory is missing or incomplete, or holds something else. The message names it.
    """
    if not directory.is_dir():
        raise ValueError(f"no such directory: {directory}")
    model = load_part(CLIPModel, directory, "clip")
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # The tokenizers library raises bare Exceptions.
        raise ValueError(f"{directory} holds no tokenizer of CLIP: {one_line(error)}") from error
    return ClipScore(model, tokenizer, load_tiny_vae(tiny_vae), margin)
