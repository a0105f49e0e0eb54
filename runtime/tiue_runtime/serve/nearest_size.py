"""Sizes: which one a model draws for a picture of any size, and how the picture then gets that size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from PIL.Image import Image, Resampling

if TYPE_CHECKING:
    from tiue_runtime.bundle import Manifest


class Size(NamedTuple):
    """Pixels. Shown as OpenAI writes it, for example 512x768."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def made_for(manifest: Manifest) -> list[Size]:
    """Return the sizes that a model was trained for, the default first."""
    return [Size(width, height) for height, width in manifest.made_for]


def nearest(sizes: list[Size], wanted: Size) -> Size:
    """Return the size whose proportions are nearest to those of the wanted one, then the nearest in area."""

    def distance(size: Size) -> tuple[float, float]:
        proportions = abs(math.log(size.width * wanted.height / (size.height * wanted.width)))
        area = abs(math.log(size.width * size.height / (wanted.width * wanted.height)))
        return round(proportions, 6), area

    return min(sizes, key=distance)


def resized(picture: Image, size: Size) -> Image:
    """Resize a picture without changing its proportions. Borders get the mean color of the picture's edge.

    The result keeps the picture's record.
    """
    if picture.size == size:
        return picture
    scale = min(size.width / picture.width, size.height / picture.height)
    inner = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    scaled = picture.resize(inner, Resampling.LANCZOS)
    if inner == size:
        return scaled
    whole = picture.resize(size, Resampling.NEAREST)  # keeps the record; its pixels are replaced
    whole.paste(_edge_color(picture), (0, 0, size.width, size.height))
    whole.paste(scaled, ((size.width - inner[0]) // 2, (size.height - inner[1]) // 2))
    return whole


def _edge_color(picture: Image) -> tuple[int, ...]:
    width, height = picture.size
    strips = [(0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height), (width - 1, 0, width, height)]
    sums, count = [0, 0, 0], 0
    for strip in strips:
        pixels = picture.crop(strip).convert("RGB").tobytes()
        sums = [total + sum(pixels[channel::3]) for channel, total in enumerate(sums)]
        count += len(pixels) // 3
    return tuple(round(total / count) for total in sums)
