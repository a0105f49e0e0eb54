"""Previews: a matrix turns latents into small pictures, at a tiny part of an image decoder's cost."""

from collections.abc import Callable

import numpy as np
from PIL.Image import Image, Resampling

from tiue_runtime.bundle import Manifest, Preview
from tiue_runtime.errors import RequestError
from tiue_runtime.images import to_pil
from tiue_runtime.ort.graph import Float32


def latents_to_rgb(preview: Preview, latents: Float32, pixels_per_latent: int = 1) -> Float32:
    """Turn latents (B, C, h, w) => rgb float32 (B, h * pixels_per_latent, w * pixels_per_latent, 3) in [0, 1].

    The color of a latent pixel is latents @ matrix + bias, clipped. It fills a square of the picture.

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


class Previews:
    """Makes the pictures of `Progress.preview`."""

    def __init__(self, manifest: Manifest, decode: Callable[[Float32], list[Image]]) -> None:
        self._manifest, self._decode = manifest, decode

    def __call__(self, latents: Float32, *, exact: bool) -> Image:
        """Turn latents (1, C, h, w) => a picture of full size. Raises RequestError if the bundle has no matrix."""
        if exact:
            return self._decode(latents)[0]
        if self._manifest.preview is None:
            raise RequestError(
                f"preview: bundle {self._manifest.name} has no matrix for quick previews; ask for exact ones"
            )
        small = to_pil(latents_to_rgb(self._manifest.preview, latents))[0]
        scale = self._manifest.pixels_per_latent
        return small.resize((small.width * scale, small.height * scale), Resampling.BILINEAR)
