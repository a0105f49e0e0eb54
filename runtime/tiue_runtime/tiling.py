"""Decoding pictures in less memory: one at a time, then in overlapping tiles that are blended linearly.

Decoding one at a time changes nothing. Tiles change the picture: an autoencoder's group norms and attention see only
one tile, so each tile gets contrasts and colors of its own. The blend hides the seams.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import ceil

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.bundle import Manifest

Float32 = NDArray[np.float32]

# Latent pixels of a tile's side. Smaller tiles show their seams: most of such a tile is overlap, and a Stable Diffusion
# decoder's receptive field is larger.
MIN_TILE = 16

OVERLAP = 0.25  # of a tile's side, shared with its neighbor


@dataclass(frozen=True)
class Plan:
    """How the latents of a request are cut into runs of the image decoder."""

    rows: int  # pictures at once
    height: int  # latent pixels of a tile, or of the whole picture
    width: int
    tiled: bool = False

    def describe(self, scale: int) -> str:
        """Describe the plan for a warning."""
        if not self.tiled:
            return f"decoding {self.rows} at once"
        size = f"{self.width * scale}x{self.height * scale}"
        return f"decoding in tiles of {size} pixels, which changes the picture"


def plans(manifest: Manifest, shape: tuple[int, ...], tiling: bool | None) -> list[Plan]:
    """List the ways to decode latents, each in less memory than the one before.

    Args:
        manifest: of the bundle.
        shape: of the latents, (B, C, h, w).
        tiling: None for whole pictures first, then tiles; False for whole pictures only; True for tiles only, if a
            picture is larger than a tile.

    Returns:
        At least one plan. The first tiles have the bundle's default size. Later plans halve it, down to MIN_TILE.
    """
    count, _, height, width = shape
    scale = manifest.pixels_per_latent
    multiple = manifest.size_multiple // scale  # A tile's sides must be sides that the bundle allows for pictures.
    least = ceil(MIN_TILE / multiple) * multiple
    side = max(manifest.default_height // scale, least), max(manifest.default_width // scale, least)
    small = height <= side[0] and width <= side[1]
    tiles: list[Plan] = []
    while True:
        if height > side[0] or width > side[1]:
            tiles.append(Plan(1, min(side[0], height), min(side[1], width), tiled=True))
        half = side[0] // 2 // multiple * multiple, side[1] // 2 // multiple * multiple
        if min(half) < least:
            break
        side = half
    if tiling and not small:
        return tiles
    whole = [Plan(rows, height, width) for rows in ((1,) if tiling or count == 1 else (count, 1))]
    return whole if tiling is False else whole + tiles


def decode_parts(
    run: Callable[[Float32], Float32],
    latents: Float32,
    plan: Plan,
    scale: int,
    report: Callable[[int, int], object] = lambda part, parts: None,
) -> Float32:
    """Turn latents (B, C, h, w) => image (B, 3, H, W). Beside the result, one part at a time is in memory.

    Args:
        run: decodes a part of the latents.
        latents: z_0.
        plan: one of `plans`.
        scale: pixels per latent, H = scale * h.
        report: called with the number of finished parts and of all parts.
    """
    count, _, height, width = latents.shape
    if (plan.rows, plan.height, plan.width) == (count, height, width):
        image = run(latents)
        report(1, 1)
        return image
    down_windows, across_windows = windows(height, plan.height, scale), windows(width, plan.width, scale)
    parts = list(product(range(0, count, plan.rows), down_windows, across_windows))
    image = np.empty(0, dtype=np.float32)
    for done, (first, (top, down), (left, across)) in enumerate(parts, start=1):
        rows, bottom, right = slice(first, first + plan.rows), top + plan.height, left + plan.width
        part = run(latents[rows, :, top:bottom, left:right])
        if not image.size:  # Allocate after the first run, which may free the memory that is needed here.
            image = np.zeros((count, 3, height * scale, width * scale), dtype=np.float32)
        image[rows, :, top * scale : bottom * scale, left * scale : right * scale] += part * (down[:, None] * across)
        report(done, len(parts))
    return image


def windows(size: int, tile: int, scale: int) -> list[tuple[int, Float32]]:
    """Spread tiles evenly along one axis, overlapping by at least OVERLAP.

    Args:
        size: latents of the axis.
        tile: latents of a tile.
        scale: pixels per latent.

    Returns:
        For each tile: its first latent, and float32 weights (tile * scale,) of its pixels. Weights rise and fall
        linearly over the overlap, but not at the border of the picture. The weights of a pixel add up to 1.
    """
    if tile >= size:
        return [(0, np.ones(size * scale, dtype=np.float32))]
    overlap = int(tile * OVERLAP)
    count = ceil((size - overlap) / (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    rise = (np.arange(tile * scale) + 0.5) / max(overlap * scale, 1)
    weights: list[NDArray[np.float64]] = []
    total = np.zeros(size * scale)
    for start in starts:
        weight = np.ones(tile * scale)
        if start > 0:
            weight = np.minimum(weight, rise)
        if start < size - tile:
            weight = np.minimum(weight, rise[::-1])
        total[start * scale : (start + tile) * scale] += weight
        weights.append(weight)
    sums = (total[start * scale : (start + tile) * scale] for start in starts)
    return [(s, (w / t).astype(np.float32)) for s, w, t in zip(starts, weights, sums, strict=True)]
