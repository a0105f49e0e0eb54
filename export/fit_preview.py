"""Fitting the preview of a bundle: a matrix that turns latents into small pictures.

Most of the color of a picture is linear in its latents. The student makes latents of prompts and noise. The fit
compares them with the VAE's pictures of them, averaged over the pixels of each latent pixel.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiue_runtime import bundle, noise

from export.calibrate import CALIBRATION_PROMPTS
from tiue.checkpoint import Student
from tiue.components import decode_latents
from tiue.text_encoder import encode_text

_LARGEST = 32  # latent pixels on a side: eight pictures of SD 2.1 take a quarter of the time of 64
_PICTURES = 8
_DECIMALS = 5


@torch.no_grad()
def fit_preview(
    student: Student, manifest: bundle.Manifest, vae: Any, progress: Callable[[str], None]
) -> bundle.Preview:
    """Fit latents (C) @ matrix (C, 3) + bias (3) => RGB in [0, 1] by least squares.

    Args:
        student: makes the latents, with another seed for each prompt, at the default size or at 32 latent pixels.
        manifest: the sizes and the default step count.
        vae: the default image decoder.
        progress: told how near the previews come to the pictures.

    Returns:
        The matrix and bias, for the manifest.
    """
    multiple = manifest.size_multiple // manifest.pixels_per_latent
    sides = manifest.default_height, manifest.default_width
    height, width = (min(side // manifest.pixels_per_latent, max(_LARGEST // multiple, 1) * multiple) for side in sides)
    model = student.tiue(manifest.default_steps)
    inputs: list[Any] = []
    targets: list[Any] = []
    for seed, prompt in enumerate(CALIBRATION_PROMPTS[:_PICTURES]):
        z_t = torch.from_numpy(noise.gaussian(seed, (1, manifest.latent_channels, height, width)))
        z_0 = model(z_t, encode_text(student.components, [prompt])).float()
        image = decode_latents(vae, z_0).float() / 2 + 0.5
        small = F.avg_pool2d(image.clamp(0, 1), manifest.pixels_per_latent)
        inputs.append(z_0[0].flatten(1).T.double().numpy())
        targets.append(small[0].flatten(1).T.double().numpy())
    x, y = np.concatenate(inputs), np.concatenate(targets)
    with_bias = np.concatenate([x, np.ones_like(x[:, :1])], axis=1)
    solution = np.linalg.lstsq(with_bias, y, rcond=None)[0].round(_DECIMALS)
    error = np.mean((np.clip(with_bias @ solution, 0, 1) - y) ** 2)
    explained = 1 - error / max(np.mean((y - y.mean(axis=0)) ** 2), 1e-12)
    progress(f"fitted the preview: {-10 * np.log10(max(error, 1e-12)):.1f} dB, R2 {explained:.3f}")
    *matrix, bias = map(_rgb, solution)
    return bundle.Preview(tuple(matrix), bias)


def _rgb(row: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, row)
    return red, green, blue
