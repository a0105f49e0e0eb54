"""Previews: latents to small pictures by a matrix, which costs nothing beside an image decoder."""

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.bundle import Preview

Float32 = NDArray[np.float32]


def latents_to_rgb(preview: Preview, latents: Float32, pixels_per_latent: int = 1) -> Float32:
    """Turn latents (B, C, h, w) => rgb float32 (B, h * pixels_per_latent, w * pixels_per_latent, 3) in [0, 1].

    A latent pixel becomes latents @ matrix + bias, clipped, and then a square of `pixels_per_latent` pixels.

    Args:
        preview: the matrix and bias of a bundle.
        latents: z_0 as the decoder makes it, or an estimate of it.
        pixels_per_latent: Manifest.pixels_per_latent for pictures of full size, 1 for one pixel per latent pixel.
    """
    matrix, bias = (np.asarray(values, dtype=np.float32) for values in (preview.matrix, preview.bias))
    rgb = np.clip(latents.transpose(0, 2, 3, 1) @ matrix + bias, 0, 1)
    return rgb.repeat(pixels_per_latent, axis=1).repeat(pixels_per_latent, axis=2)
