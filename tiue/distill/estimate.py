"""What a run will take, before it takes it: parameters and memory, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tiue.distill.config import DistillConfig
from tiue.distill.scores import Scores
from tiue.schedule import Schedule, closed_form
from tiue.unet import Predictor, TiUE

_TEXT_LENGTH = 77  # CLIP's; longer texts take more


@dataclass(frozen=True)
class Estimate:
    """Of one process. Bytes are of what stays through a run; activations are those that a backward pass keeps."""

    student_parameters: int
    trained_fake_parameters: int
    weights_bytes: int  # of teacher, student and fake score
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int  # where it is on the same device
    activations_bytes: int  # of the student's update, which keeps the most

    @property
    def total_bytes(self) -> int:
        """All of them."""
        parts = self.weights_bytes, self.gradients_bytes, self.optimizer_bytes, self.ema_bytes, self.activations_bytes
        return sum(parts)


def estimate(
    unet_config: Mapping[str, Any], scheduler_config: Mapping[str, Any], config: DistillConfig, device: str = "cuda"
) -> Estimate:
    """Take the networks of a run through an update without weights or computing; for one process, not sharded.

    device: "cuda" or "cpu", where torch's autocast differs.
    """
    schedule = closed_form(scheduler_config, max(config.steps))
    scheduler = DDIMScheduler.from_config(dict(scheduler_config), clip_sample=False)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
        teacher = UNet2DConditionModel.from_config(unet_config)
        scores = Scores(teacher, scheduler, config)
    with FakeTensorMode():
        activations = _activations(UNet2DConditionModel.from_config(unet_config), schedule, config, device)
    trained = [*unet.parameters(), *scores.parameters()]
    networks = {id(module): module for module in (unet, teacher, scores.network)}.values()
    state = 2 if config.optimizer == "adam8bit" else 8  # Adam's two averages of a parameter
    return Estimate(
        student_parameters=_count(unet.parameters()),
        trained_fake_parameters=_count(scores.parameters()),
        weights_bytes=4 * sum(_count(network.parameters()) for network in networks),
        gradients_bytes=4 * _count(trained),
        optimizer_bytes=state * _count(trained),
        ema_bytes=0 if config.ema_on_cpu else 4 * _count(unet.parameters()),
        activations_bytes=activations,
    )


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _activations(unet: UNet2DConditionModel, schedule: Schedule, config: DistillConfig, device: str) -> int:
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    predictor = Predictor(TiUE(unet, schedule, schedule.timesteps[0], config.shared_up_blocks), config.share_encoder)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if device == "cuda":  # where autocast normalises in float32
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    latents = torch.empty(config.batch_size, unet.config.in_channels, height, width)
    text = torch.empty(config.batch_size, _TEXT_LENGTH, unet.config.cross_attention_dim)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    with (
        torch.autocast("cpu", dtype, enabled=dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        answer = predictor(latents, text, schedule)
    del answer
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
