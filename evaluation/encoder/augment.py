"""Random changes of a drawing after which it still shows the same thing in the same style."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ZOOM, STRETCH, TURN, SHIFT = 0.3, 0.1, 0.15, 0.12  # at most: factors, radians, and a part of the side
CONTRAST, SATURATION, TINT, BRIGHTNESS = 0.3, 0.3, 0.1, 0.1  # small enough that a color keeps its name
BLURRED, ON_COLOR = 0.3, 0.3  # probabilities
DARKEST_PAPER = 0.6  # the darkest that a channel of the paper gets, in [0, 1]; drawings are on white
NOISE = 0.04  # standard deviation at most, of pixels in [-1, 1]

# Words of concepts whose mirror image is another concept, or wrong: clocks, arrows, flags, letters.
_SIDED = (
    "left",
    "right",
    "clock",
    "thirty",
    "flag",
    "button",
    "keycap",
    "input",
    "arrow",
    "index",
    "sign",
    "mark",
    "symbol",
)


def may_be_mirrored(label: str) -> bool:
    """Whether a mirror image of a drawing still shows the concept."""
    return not any(word in label.lower() for word in _SIDED)


def augment(pixels: Tensor, mirror: Tensor, generator: torch.Generator) -> Tensor:
    """Change each drawing by random amounts.

    Args:
        pixels: drawings on white (B, 3, H, W) in [-1, 1].
        mirror: which may be mirrored, bool (B,).
        generator: on the CPU.

    Returns:
        Drawings (B, 3, H, W), about in [-1, 1].
    """
    pixels = _move(pixels, mirror, generator)
    pixels = _recolor(pixels, generator)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pixels = torch.where(_chance(BLURRED, pixels, generator), blurred, pixels)
    pixels = torch.where(_chance(ON_COLOR, pixels, generator), _on_paper(pixels, generator), pixels)
    strength = NOISE * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    return pixels + strength * torch.randn(pixels.shape, generator=generator)


def _move(pixels: Tensor, mirror: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, zoom, stretch, turn and shift. Pixels that come into view are white."""
    count = len(pixels)
    side = torch.where(mirror & (torch.rand(count, generator=generator) < 0.5), -1.0, 1.0)
    zoom = 1 + _signed(ZOOM, (count,), generator)
    stretch = 1 + _signed(STRETCH, (count,), generator)
    turn = _signed(TURN, (count,), generator)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = side * zoom * stretch * turn.cos(), -zoom * turn.sin()
    matrix[:, 1, 0], matrix[:, 1, 1] = side * zoom * turn.sin(), zoom / stretch * turn.cos()
    matrix[:, :, 2] = _signed(2 * SHIFT, (count, 2), generator)  # a side is 2 long in these coordinates
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def _recolor(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Change contrast, saturation, tint and brightness. White stays white, so that the paper does not tell."""
    one, three = (len(pixels), 1, 1, 1), (len(pixels), 3, 1, 1)
    gray = pixels.mean(dim=1, keepdim=True)
    pixels = gray + (pixels - gray) * (1 + _signed(SATURATION, one, generator))
    gain = (1 + _signed(CONTRAST, one, generator)) * (1 + _signed(TINT, three, generator))
    drawn = (pixels < 0.99).any(dim=1, keepdim=True)
    return ((pixels - 1) * gain + 1 + drawn * _signed(BRIGHTNESS, one, generator)).clamp(-1, 1)


def _on_paper(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Put drawings on paper of a pale color. The drawing keeps its colors, but for white."""
    paper = 2 * (1 - (1 - DARKEST_PAPER) * torch.rand(len(pixels), 3, 1, 1, generator=generator)) - 1
    drawn = (6 * (1 - pixels.amin(dim=1, keepdim=True))).clamp(0, 1)
    return drawn * pixels + (1 - drawn) * paper


def _signed(most: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [-most, most]."""
    return most * (2 * torch.rand(*shape, generator=generator) - 1)


def _chance(probability: float, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Choose some of the drawings, bool (B, 1, 1, 1)."""
    return torch.rand(len(pixels), 1, 1, 1, generator=generator) < probability
