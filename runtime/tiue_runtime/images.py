"""Conversion of the image decoder's output to pictures."""

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, fromarray


def to_unit(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn (B, 3, H, W) in [-1, 1] => float32 (B, H, W, 3) in [0, 1], clipped."""
    unit = np.clip(image.astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(unit.transpose(0, 2, 3, 1))


def to_pil(unit: NDArray[np.float32]) -> list[Image]:
    """Turn float32 (B, H, W, 3) in [0, 1] => B pictures in mode RGB, rounded to the nearest of 256 levels."""
    return [fromarray(pixels) for pixels in np.round(unit * np.float32(255)).astype(np.uint8)]
