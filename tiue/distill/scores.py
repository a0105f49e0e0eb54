"""The two scores that VSD compares: the frozen teacher, and the fake score that follows the student."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from tiue.diffusion import Diffusion
from tiue.distill.config import DistillConfig


class Scores:
    """Teacher and fake score around one frozen UNet.

    With `fake_score="lora"`, the fake score is the teacher with adapters on to_q and to_v, so both share weights. With
    "full", it is a trainable copy.

    Args:
        unet: the teacher. It is frozen, and may get adapters, in place.
        diffusion: the teacher's noise process.
        config: the settings.
    """

    def __init__(self, unet: UNet2DConditionModel, diffusion: Diffusion, config: DistillConfig):
        self._teacher = unet.requires_grad_(False)
        self._lora = config.fake_score == "lora"
        if self._lora:
            adapters = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=["to_q", "to_v"])
            unet.add_adapter(adapters)
            self.network: nn.Module = unet
        else:
            self.network = copy.deepcopy(unet).requires_grad_(True)
        self._diffusion = diffusion

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the fake score."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def teacher(self, z: Tensor, t: Tensor, text: Tensor, null: Tensor, guidance: float) -> Tensor:
        """Return the teacher's eps (B, C, h, w) with guidance, at timesteps t int64 (B,)."""
        if not self._lora:
            return self._guided(self._teacher, z, t, text, null, guidance)
        self._teacher.disable_adapters()
        try:
            return self._guided(self._teacher, z, t, text, null, guidance)
        finally:
            self._teacher.enable_adapters()

    def fake(self, z: Tensor, t: Tensor, text: Tensor, null: Tensor, guidance: float) -> Tensor:
        """Return the fake score's eps (B, C, h, w) with guidance, at timesteps t int64 (B,)."""
        return self._guided(self.network, z, t, text, null, guidance)

    def fake_eps(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Return the fake score's eps (B, C, h, w) without guidance. Its own loss trains this output."""
        return self._diffusion.noise(self.network(z, t, text).sample.float(), z, t)

    def _guided(self, network, z: Tensor, t: Tensor, text: Tensor, null: Tensor, guidance: float) -> Tensor:
        return self._diffusion.noise(guided(network, z, t, text, null, guidance), z, t)


def guided(network: nn.Module, z: Tensor, t: Tensor, text: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): F(null) + guidance (F(text) - F(null)), for eps or v.

    Args:
        network: a UNet.
        z: noised latents, (B, C, h, w).
        t: their timesteps, int64 (B,).
        text: text embeddings, (B, L, D).
        null: the embedding of the empty prompt, (1, L, D).
        guidance: the scale, or a scale for each sample, (B, 1, 1, 1). The number 1 saves half of the work.

    Returns:
        The guided prediction, float32 (B, C, h, w).
    """
    if isinstance(guidance, float) and guidance == 1.0:
        return network(z, t, text).sample.float()
    both = torch.cat([null.expand_as(text), text])
    without, conditional = network(z.repeat(2, 1, 1, 1), t.repeat(2), both).sample.float().chunk(2)
    return without + guidance * (conditional - without)
