"""The two scores that VSD compares: the frozen teacher, and the fake score that follows the student."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from tiue.distill.config import DistillConfig
from tiue.schedule import NoiseSchedule


class Scores:
    """Teacher and fake score around one frozen UNet.

    With `fake_score="lora"`, the fake score is the teacher with adapters on to_q and to_v, so both share weights. With
    "full", it is a trainable copy.

    Args:
        unet: the teacher. It is frozen, and may get adapters, in place.
        process: the teacher's noise process, with its prediction type (epsilon or v).
        config: the settings.
    """

    def __init__(self, unet: UNet2DConditionModel, process: NoiseSchedule, config: DistillConfig):
        self._teacher = unet.requires_grad_(False)
        self._lora = config.fake_score == "lora"
        if self._lora:
            adapters = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=["to_q", "to_v"])
            unet.add_adapter(adapters)
            self.network: nn.Module = unet
        else:
            self.network = copy.deepcopy(unet).requires_grad_(True)
        self._abar = process.alphas_cumprod.float()
        self._v = process.prediction_type == "v_prediction"

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
        return self._eps(self.network, z, t, text)

    def _guided(self, network, z: Tensor, t: Tensor, text: Tensor, null: Tensor, guidance: float) -> Tensor:
        if guidance == 1.0:
            return self._eps(network, z, t, text)
        both = torch.cat([null.expand_as(text), text])
        unconditional, conditional = self._eps(network, z.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _eps(self, network, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        prediction = network(z, t, text).sample.float()
        if not self._v:
            return prediction
        abar = self._abar.to(z.device)[t].view(-1, 1, 1, 1)
        return abar.sqrt() * prediction + (1 - abar).sqrt() * z
