"""Sampling in a few steps with new noise, as consistency models do, by diffusers' LCMScheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor

from tiue.fold import embed_guidance


def sample_few_steps(
    unet: UNet2DConditionModel,
    scheduler_config: Mapping[str, Any],
    noise: Tensor,
    text: Tensor,
    steps: int,
    seeds: Sequence[int],
    guidance: float | None = None,
) -> Tensor:
    """Turn noise into latents: estimate z_0, add new noise for the next timestep, and so on.

    Args:
        unet: the network.
        scheduler_config: configuration of the LCMScheduler.
        noise: z_T, float (B, C, h, w).
        text: text embeddings, (B, L, D).
        steps: number of estimates.
        seeds: of the new noise, one for each sample.
        guidance: for a UNet that takes a guidance scale as an input; None for one that takes none.

    Returns:
        Latents z_0, (B, C, h, w).
    """
    scheduler = LCMScheduler.from_config(dict(scheduler_config))
    scheduler.set_timesteps(steps, original_inference_steps=max(steps, scheduler.config.original_inference_steps))
    size, condition = unet.config.time_cond_proj_dim, None
    if size is not None:
        condition = embed_guidance(torch.full((len(noise),), 1.0 if guidance is None else guidance), size)
        condition = condition.to(noise.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = z_0 = noise
    for t in scheduler.timesteps:
        rows = t.to(noise.device).expand(len(z))
        predicted = unet(z, rows, text, None, condition).sample.float()
        z, z_0 = scheduler.step(predicted, t, z, generator=generators, return_dict=False)
    return z_0
