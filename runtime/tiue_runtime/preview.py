"""Previews: a matrix turns latents into small pictures, at a tiny part of an image decoder's cost."""

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.bundle import Preview

Float32 = NDArray[np.float32]


def latents_to_rgb(preview: Preview, latents: Float32, pixels_per_latent: int = 1) -> Float32:
    """Turn latents (B, C, h, w) => rgb float32 (B, h * pixels_per_latent, w * pixels_per_latent, 3) in [0, 1].

    The colour of a latent pixel is latents @ matrix + bias, clipped. It fills a square of the picture.

    Args:
        preview: the matrix and bias of a bundle.
        latents: z_0, or an estimate of it, float32.
        pixels_per_latent: the side of the square. Manifest.pixels_per_latent makes pictures of full size.

    Returns:
        The pictures.
    """
    matrix, bias = (np.asarray(values, dtype=np.float32) for values in (preview.matrix, preview.bias))
    rgb = np.clip(latents.transpose(0, 2, 3, 1) @ matrix + bias, 0, 1)
    return rgb.repeat(pixels_per_latent, axis=1).repeat(pixels_per_latent, axis=2)
