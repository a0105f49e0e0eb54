"""The grid of sample pictures that a run makes at regular intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from tiue.components import decode_latents
from tiue.files import written_whole


def sample_noise(count: int, shape: Sequence[int]) -> Tensor:
    """Draw the noise of the sample pictures, float32 (count, *shape). It is always the same."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def pictures(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) => pictures uint8 (B, 3, H, W) on the CPU, one by one to save memory.

    The VAE is on the latents' device only during this call.
    """
    vae.to(latents.device)
    pixels = torch.cat([decode_latents(vae, z[None]) for z in latents.float()])
    vae.cpu()
    return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().cpu()


def save_grid(images: Tensor, path: Path) -> None:
    """Write pictures uint8 (n, 3, H, W) as one PNG, in up to four rows."""
    rows = next(rows for rows in (4, 3, 2, 1) if len(images) % rows == 0)
    grid = make_image_grid(
        [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()], rows, len(images) // rows
    )
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as temporary:
        grid.save(temporary, format="png")
