"""After the teacher: train the image decoder further. The encoder does not change, so all latents stay valid.

The teacher needs only latents. The look of pictures depends on the image decoder as well, which can be improved at any
later time, and learns here to forgive small errors of a student.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from recipes.emoji.autoencoder import encode, gradient_loss, to_pixels
from recipes.emoji.data import Drawings
from recipes.emoji.presets import Preset
from recipes.emoji.stage import device, minimize, on_device
from tiue.components import decode_latents

LATENT_NOISE = 0.05  # in standard deviations of the latents; imitates the error of a student's latents


def polish(preset: Preset, drawings: Drawings, source: Path, directory: Path) -> None:
    """Copy the teacher pipeline `source` to `directory` (once), with a VAE decoder that is trained further."""
    if directory.exists():
        return
    vae = AutoencoderKL.from_pretrained(source / "vae").to(device())
    images = torch.from_numpy(drawings.images[~drawings.held_out]).to(device())
    images = torch.cat([images, images.flip(2)])
    latents = encode(vae, images)
    vae.requires_grad_(False)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)

    def loss(generator: torch.Generator, count: int) -> Tensor:
        random = on_device(generator)
        rows = torch.randint(len(images), (count,), generator=random, device=images.device)
        z = latents[rows]
        z = z + LATENT_NOISE * torch.randn(z.shape, generator=random, device=z.device)
        x = to_pixels(images[rows])
        y = decode_latents(vae, z).float()
        return (y - x).abs().mean() + gradient_loss(y, x)

    minimize(
        decoder,
        loss,
        directory.parent / "runs/polish",
        iterations=preset.polish_steps,
        batch_size=preset.autoencoder_batch,
        learning_rate=preset.polish_lr,
        ema_decay=0.995,
        seed=preset.seed + 2,
    )
    unfinished = directory.with_suffix(".tmp")
    shutil.copytree(source, unfinished, dirs_exist_ok=True)
    vae.save_pretrained(unfinished / "vae")
    unfinished.rename(directory)
