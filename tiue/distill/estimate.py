"""Estimate parameters and memory of a run before it starts, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tiue.diffusion import Diffusion
from tiue.distill.config import DistillConfig, autocast_dtype
from tiue.distill.scores import Scores
from tiue.schedule import NoiseSchedule, Schedule
from tiue.unet import Predictor, TiUE

_TEXT_LENGTH = 77  # tokens, as in CLIP; longer texts take more memory


@dataclass(frozen=True)
class Estimate:
    """Memory of one process during the run. Activations are those that a backward pass keeps."""

    student_parameters: int
    trained_fake_parameters: int
    weights_bytes: int  # teacher, student and fake score
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int  # 0 if the average is on the CPU
    activations_bytes: int  # of the student's update, the largest

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        parts = self.weights_bytes, self.gradients_bytes, self.optimizer_bytes, self.ema_bytes, self.activations_bytes
        return sum(parts)


def estimate(
    unet_config: Mapping[str, Any], scheduler_config: Mapping[str, Any], config: DistillConfig, device: str = "cuda"
) -> Estimate:
    """Estimate the memory of one process without sharding, by an update on meta tensors: nothing is computed.

    Args:
        unet_config: configuration of the teacher's UNet.
        scheduler_config: configuration of the teacher's scheduler.
        config: the settings.
        device: "cuda" or "cpu". torch's autocast differs between them.

    Returns:
        The estimate.
    """
    process = NoiseSchedule.from_config(scheduler_config)
    schedule = process.closed_form(max(config.steps))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
        teacher = UNet2DConditionModel.from_config(unet_config)
        scores = Scores(teacher, Diffusion(process, torch.device("cpu")), config)
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
        ema_bytes=0 if config.ema_on_cpu or not config.ema_decay else 4 * _count(unet.parameters()),
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
    if device == "cuda":  # On GPUs, autocast normalizes in float32.
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    latents = torch.empty(config.batch_size, unet.config.in_channels, height, width)
    text = torch.empty(config.batch_size, _TEXT_LENGTH, unet.config.cross_attention_dim)
    dtype = autocast_dtype(config.mixed_precision)
    with (
        torch.autocast("cpu", dtype, enabled=dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        answer = predictor(latents, text, schedule)
    del answer
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
