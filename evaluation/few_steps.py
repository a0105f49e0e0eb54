"""Sampling in a few steps with new noise, as consistency models do, by diffusers' LCMScheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor

from tiue.fold import embed_guidance

# Latents (B, C, h, w) and their timesteps, int64 (B,) => the prediction, float32 (B, C, h, w).
Predict = Callable[[Tensor, Tensor], Tensor]


def sample_few_steps(
    predict: Predict, scheduler_config: Mapping[str, Any], noise: Tensor, steps: int, seeds: Sequence[int]
) -> Tensor:
    """Turn noise into latents: estimate z_0, add new noise for the next timestep, and so on.

    Args:
        predict: the network.
        scheduler_config: configuration of the LCMScheduler.
        noise: z_T, float (B, C, h, w).
        steps: number of estimates.
        seeds: of the new noise, one for each sample.

    Returns:
        Latents z_0, (B, C, h, w).

    Raises:
        ValueError: the scheduler's grid has fewer timesteps.
    """
    scheduler = LCMScheduler.from_config(dict(scheduler_config))
    if steps > (known := scheduler.config.original_inference_steps):
        raise ValueError(f"`steps` must be at most {known}, the timesteps that this model knows, got {steps}")
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = z_0 = noise
    for t in scheduler.timesteps:
        predicted = predict(z, t.to(noise.device).expand(len(z)))
        z, z_0 = scheduler.step(predicted, t, z, generator=generators, return_dict=False)
    return z_0


def distilled(unet: UNet2DConditionModel, text: Tensor, guidance: float | None = None) -> Predict:
    """Call a distilled UNet, which needs no classifier-free guidance.

    Args:
        unet: the network.
        text: text embeddings, (B, L, D).
        guidance: for a UNet that takes a guidance scale as an input, 1 by default. Others ignore it.
    """
    size, condition = unet.config.time_cond_proj_dim, None
    if size is not None:
        condition = embed_guidance(torch.full((len(text),), 1.0 if guidance is None else guidance), size)
        condition = condition.to(text.device)
    return lambda z, t: unet(z, t, text, None, condition).sample.float()
