"""Pictures with captions, for the methods that learn from pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from evaluation.reference import Files
from tiue.components import latent_scaling
from tiue.distill.draws import Part
from tiue.files import digest, one_line

METADATA = "metadata.jsonl"


class CaptionedPictures:
    """A folder of pictures with metadata.jsonl, as the "imagefolder" of Hugging Face's datasets has it.

    A line of metadata.jsonl is an object. `file_name` is a path in the folder. `text` is the caption, or a list of
    captions, of which each sample draws one.

    Args:
        directory: the folder.
        size: height and width that pictures are scaled to, pixels.

    Raises:
        ValueError: metadata.jsonl is missing or malformed, or names a file that is not there.
    """

    def __init__(self, directory: Path, size: int):
        rows = _read(directory)
        self._files = Files([directory / name for name, _ in rows], size)
        self._captions = [captions for _, captions in rows]
        self.digest = digest([json.dumps(row) for row in rows])

    def __len__(self) -> int:
        return len(self._captions)

    def first(self, count: int) -> list[str]:
        """Return a caption of each of the first pictures."""
        return [captions[0] for captions in self._captions[:count]]

    def of(self, part: Part) -> tuple[Tensor, list[str]]:
        """Draw the samples of a part.

        Returns:
            Pixels (B, 3, H, W) in [-1, 1], float32, on the device of the part, and the captions.
        """
        rows = part.draws.integers(0, len(self)).tolist()
        shares = part.draws.uniform().tolist()
        captions = [self._captions[row] for row in rows]
        pixels = torch.from_numpy(self._files[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        chosen = [texts[int(share * len(texts))] for texts, share in zip(captions, shares, strict=True)]
        return pixels.to(part.device), chosen


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Turn pixels (B, 3, H, W) in [-1, 1] into the UNet's latents z_0 (B, C, h, w), float32: the mean of each."""
    scale, shift = latent_scaling(vae)
    return (vae.encode(pixels).latent_dist.mean.float() - shift) * scale


def _read(directory: Path) -> list[tuple[str, list[str]]]:
    """Return the file name and the captions of every picture."""
    path = directory / METADATA
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the captions of the pictures: {one_line(error)}") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    if not rows:
        raise ValueError(f"{path}: expected at least one picture, found none")
    if missing := next((name for name, _ in rows if not (directory / name).is_file()), None):
        raise ValueError(f"{path}: names {one_line(missing, 100)}, which is not in the folder")
    return rows


def _row(path: Path, number: int, line: str) -> tuple[str, list[str]]:
    expected = f'{path}, line {number}: expected {{"file_name": ..., "text": ...}}'
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{expected}: {one_line(error)}") from error
    name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
    captions = [text] if isinstance(text, str) else text
    if not (isinstance(name, str) and name and isinstance(captions, list) and captions):
        raise ValueError(f"{expected}, got {one_line(line, 100)}")
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{expected} with one caption or a list of captions, got {one_line(line, 100)}")
    return name, captions
