"""An AutoencoderKL, trained with an L1 and a gradient loss. Its latents are whitened, channel by channel."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from recipes.directory import whole_directory
from recipes.emoji.data import Drawings
from recipes.emoji.presets import Preset
from recipes.emoji.stage import device, minimize, on_device
from tiue.components import decode_latents, latent_scaling

KL_WEIGHT = 1e-5  # per latent element; it keeps latents near zero and is too small to blur


def to_pixels(images: Tensor) -> Tensor:
    """Turn uint8 (n, H, W, 3) into float32 (n, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def autoencoder(preset: Preset, drawings: Drawings, directory: Path) -> AutoencoderKL:
    """Train (once) and load the autoencoder. Every channel of its training latents has mean 0 and variance 1."""
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
        mid_block_add_attention=False,
        scaling_factor=1.0,
        sample_size=preset.resolution,
    ).to(device())
    images = torch.from_numpy(drawings.images[~drawings.held_out]).to(device())

    def loss(generator: torch.Generator, count: int) -> Tensor:
        random = on_device(generator)
        rows = torch.randint(len(images), (count,), generator=random, device=images.device)
        flip = torch.rand(count, 1, 1, 1, generator=random, device=images.device) < 0.5
        x = to_pixels(images[rows])
        x = torch.where(flip, x.flip(-1), x)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=random, device=x.device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        return (y - x).abs().mean() + gradient_loss(y, x) + KL_WEIGHT * posterior.kl().mean() / x[0].numel()

    minimize(
        vae,
        loss,
        directory.parent / "runs/autoencoder",
        iterations=preset.autoencoder_steps,
        batch_size=preset.autoencoder_batch,
        muon=preset.autoencoder_muon,
        learning_rate=preset.autoencoder_lr,
        ema_decay=preset.autoencoder_ema_decay,
        seed=preset.seed,
    )
    whiten(vae, encode(vae, images))
    with whole_directory(directory) as unfinished:
        vae.save_pretrained(unfinished)


def gradient_loss(y: Tensor, x: Tensor) -> Tensor:
    """Return the mean absolute difference of horizontal and vertical finite differences. It keeps outlines sharp."""
    return sum((y.diff(dim=dim) - x.diff(dim=dim)).abs().mean() for dim in (-1, -2))


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give every channel of the latents mean 0 and variance 1. Pictures and their reconstructions stay the same.

    With mean m_c and deviation s_c of channel c, the latents become (z_c - m_c) / s_c. The two 1x1 convolutions beside
    the latents take this in: quant_conv, whose outputs are means and log variances, and post_quant_conv.

    Args:
        vae: an autoencoder without scaling. It is changed in place.
        latents: its latents of the training pictures, (n, C, h, w).
    """
    mean, deviation = (f(latents.double(), dim=(0, 2, 3)).float().to(vae.device) for f in (torch.mean, torch.std))
    first, last, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    first.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    first.bias[:channels] = (first.bias[:channels] - mean) / deviation
    first.bias[channels:] -= 2 * deviation.log()
    last.bias += last.weight[:, :, 0, 0] @ mean
    last.weight *= deviation.view(1, -1, 1, 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Turn pictures uint8 (n, H, W, 3) into scaled latents (n, C, h, w), on the device of the recipe."""
    means = [vae.encode(to_pixels(part.to(vae.device))).latent_dist.mean for part in images.split(64)]
    return torch.cat(means) * latent_scaling(vae)[0]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Turn scaled latents (n, C, h, w) into pictures uint8 (n, H, W, 3) on the CPU."""
    parts = [decode_latents(vae, part.to(vae.device)) for part in latents.split(64)]
    pixels = (torch.cat(parts).float().cpu() / 2 + 0.5).clamp(0, 1)
    return (pixels * 255).round().byte().permute(0, 2, 3, 1)
