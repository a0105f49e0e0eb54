"""After the teacher: train the decoder on, with the encoder and so all latents as they are.

The teacher only needs latents, so it can begin with an autoencoder that is good enough; what is seen depends on
the decoder alone, and that can be improved at any time after.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from recipes.emoji import loop
from recipes.emoji.autoencoder import encode, gradient_loss, to_pixels
from recipes.emoji.data import Drawings
from recipes.emoji.presets import Preset

LATENT_NOISE = 0.05  # of the latents' standard deviation: a student's latents are not exactly an encoder's


def polish(preset: Preset, drawings: Drawings, source: Path, directory: Path) -> None:
    """Copy the teacher pipeline `source` to `directory` (once) with a better trained VAE decoder."""
    if directory.exists():
        return
    vae = AutoencoderKL.from_pretrained(source / "vae").to(loop.device())
    pixels = to_pixels(drawings.images[~drawings.held_out])
    pixels = torch.cat([pixels, pixels.flip(-1)])
    latents = encode(vae, pixels)
    vae.requires_grad_(False)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pixels), (preset.autoencoder_batch,), generator=generator)
        z = latents[rows] + LATENT_NOISE * torch.randn(latents[rows].shape, generator=generator)
        x = pixels[rows].to(loop.device())
        y = vae.decode(z.to(x.device) / vae.config.scaling_factor).sample.float()
        return (y - x).abs().mean() + gradient_loss(y, x)

    loop.train(
        decoder,
        loss,
        steps=preset.polish_steps,
        lr=preset.polish_lr,
        seed=preset.seed + 2,
        out=directory,
        ema_decay=0.995,
    )
    unfinished = directory.with_suffix(".tmp")
    shutil.copytree(source, unfinished, dirs_exist_ok=True)
    vae.save_pretrained(unfinished / "vae")
    unfinished.rename(directory)
