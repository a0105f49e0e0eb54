"""SwiftBrush v2. arXiv 2408.14176. It is SwiftBrush (see `swiftbrush`) with three changes:

start       the student begins as an adversarially distilled one (SD-Turbo; here the result of `add`),
CLIP        loss = VSD + lambda relu(tau - mean cos(picture, caption)), lambda 0.1 and falling to 0, tau 0.35,
merging     theta = (1 - share) theta_full + share theta_lora, of two students: one trained as a whole, and one by
            adapters (LoRA), whose changes are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from recipes.baselines import swiftbrush
from recipes.baselines.config import SwiftBrushV2Config
from tiue.checkpoint import Student
from tiue.components import Components
from tiue.distill.clip import Alignment
from tiue.distill.method import Run
from tiue.distill.vsd import Vsd


class SwiftBrushV2(Vsd):
    """One-step VSD whose student may be trained by adapters."""

    name = "swiftbrushv2"
    config: SwiftBrushV2Config

    def _trainable(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        if not self.config.student_rank:
            return super()._trainable(unet)
        torch.manual_seed(self.config.seed)  # The initial weights of adapters are random.
        return with_adapters(unet.requires_grad_(False), self.config.student_rank)

    def finished(self, weights: Mapping[str, Tensor]) -> Student:
        """Put the averaged weights into the student, with its adapters merged."""
        if not self.config.student_rank:
            return super().finished(weights)
        unet = with_adapters(UNet2DConditionModel.from_config(self.model.config), self.config.student_rank)
        unet.load_state_dict(weights)
        unet.fuse_lora()
        unet.unload_lora()
        return super().finished(unet.state_dict())


def prepare(
    teacher: Components,
    prompts: Iterable[str],
    out: Path,
    config: SwiftBrushV2Config,
    *,
    initial: UNet2DConditionModel,
    alignment: Alignment,
    sample_prompts: Sequence[str] | None = None,
) -> tuple[Run, Vsd]:
    """Prepare SwiftBrush v2 for `loop.train`. See `swiftbrush.prepare`; the start and the alignment are required."""
    return swiftbrush.prepare(
        teacher,
        prompts,
        out,
        config,
        initial=initial,
        sample_prompts=sample_prompts,
        alignment=alignment,
        method=SwiftBrushV2,
    )


def merge(full: Student, lora: Student, share: float = 0.5) -> Student:
    """Merge two students with the same structure: (1 - share) full + share lora, for every weight of the UNet.

    Raises:
        ValueError: their UNets have other weights.
    """
    one, other = full.components.unet.state_dict(), lora.components.unet.state_dict()
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in other.items()}:
        raise ValueError("students to merge need UNets of the same structure")
    unet = UNet2DConditionModel.from_config(full.components.unet.config).eval()
    unet.load_state_dict({name: torch.lerp(value, other[name], share) for name, value in one.items()})
    history = [*full.provenance.get("history", []), {"merged with": lora.provenance, "share": share}]
    provenance = full.provenance | {"history": history}
    return replace(full, components=replace(full.components, unet=unet), provenance=provenance)


def with_adapters(unet: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """Add adapters, which can be trained, to all attention of a UNet, in place."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet
