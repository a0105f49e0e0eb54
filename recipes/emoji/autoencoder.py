"""An AutoencoderKL, trained with an L1 and a gradient loss. Latents have an eighth of a picture's height and width."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from recipes.emoji.data import Drawings
from recipes.emoji.presets import Preset
from recipes.emoji.stage import device, minimize
from tiue.components import decode_latents, latent_scaling

KL_WEIGHT = 1e-5  # per latent element; it keeps latents near zero and is too small to blur


def to_pixels(images) -> Tensor:
    """Turn uint8 (n, H, W, 3) into float32 (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def autoencoder(preset: Preset, drawings: Drawings, directory: Path) -> AutoencoderKL:
    """Train (once) and load the autoencoder. Its `scaling_factor` gives the training latents unit variance."""
    if not (directory / "config.json").exists():
        _train(preset, drawings, directory)
    return AutoencoderKL.from_pretrained(directory).to(device()).eval()


def _train(preset: Preset, drawings: Drawings, directory: Path) -> None:
    torch.manual_seed(preset.seed)
    widths = preset.autoencoder_widths
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=preset.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=preset.resolution,
    ).to(device())
    pixels = to_pixels(drawings.images[~drawings.held_out])

    def loss(generator: torch.Generator, count: int) -> Tensor:
        rows = torch.randint(len(pixels), (count,), generator=generator)
        flip = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, pixels[rows].flip(-1), pixels[rows]).to(device())
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        return (y - x).abs().mean() + gradient_loss(y, x) + KL_WEIGHT * posterior.kl().mean() / x[0].numel()

    minimize(
        vae,
        loss,
        directory.parent / "runs/autoencoder",
        iterations=preset.autoencoder_steps,
        batch_size=preset.autoencoder_batch,
        learning_rate=preset.autoencoder_lr,
        ema_decay=0.0,
        seed=preset.seed,
    )
    vae.register_to_config(scaling_factor=1 / encode(vae, pixels, scale=False).std().item())
    vae.save_pretrained(directory)


def gradient_loss(y: Tensor, x: Tensor) -> Tensor:
    """Return the mean absolute difference of horizontal and vertical finite differences. It keeps outlines sharp."""
    return sum((y.diff(dim=dim) - x.diff(dim=dim)).abs().mean() for dim in (-1, -2))


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, scale: bool = True) -> Tensor:
    """Turn pixels (n, 3, H, W) in [-1, 1] into latents (n, C, h, w) on the CPU, of unit variance if `scale`."""
    means = [vae.encode(part.to(vae.device)).latent_dist.mean.cpu() for part in pixels.split(64)]
    return torch.cat(means) * (latent_scaling(vae)[0] if scale else 1.0)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Turn scaled latents (n, C, h, w) into pictures uint8 (n, H, W, 3) on the CPU."""
    parts = [decode_latents(vae, part.to(vae.device)) for part in latents.split(64)]
    pixels = (torch.cat(parts).float().cpu() / 2 + 0.5).clamp(0, 1)
    return (pixels * 255).round().byte().permute(0, 2, 3, 1)
