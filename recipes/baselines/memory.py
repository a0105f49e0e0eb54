"""Estimate the memory of a run before it starts, from shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from recipes.baselines.swiftbrushv2 import with_adapters
from tiue.components import read_configs
from tiue.distill.config import DistillConfig, RunConfig
from tiue.distill.estimate import estimate

_NETWORKS = {"lcm": 3, "add": 2}  # UNets: teacher and student; for LCM the target, too


def memory(method: str, teacher: str | Path, config: RunConfig) -> dict[str, int]:
    """Estimate the memory of one process.

    VAE, text encoder, critic and observer are left out: they are small beside the UNets, except for the activations of
    a decoded picture.

    Args:
        method: its name.
        teacher: a diffusers pipeline directory.
        config: the settings of the method.

    Returns:
        Bytes by purpose.
    """
    unet, scheduler = read_configs(teacher)
    scheduler = scheduler | {"timestep_spacing": "trailing"}
    shared = ("batch_size", "mixed_precision", "ema_decay", "ema_on_cpu")
    common: dict[str, Any] = {name: getattr(config, name) for name in shared}
    of_vsd = config if isinstance(config, DistillConfig) else DistillConfig(steps=(1,), **common)
    cost = estimate(unet, scheduler, of_vsd)
    found = {
        "weights": cost.weights_bytes,
        "gradients": cost.gradients_bytes,
        "Adam": cost.optimizer_bytes,
        "EMA": cost.ema_bytes,
        "activations": cost.activations_bytes,
    }
    if method in _NETWORKS:  # Only the student is trained.
        weights = 4 * cost.student_parameters
        found |= {"weights": _NETWORKS[method] * weights, "gradients": weights, "Adam": 2 * weights}
    if rank := getattr(config, "student_rank", 0):  # Only its adapters are trained.
        with torch.device("meta"):
            student = with_adapters(UNet2DConditionModel.from_config(unet).requires_grad_(False), rank)
        adapters = sum(p.numel() for p in student.parameters() if p.requires_grad)
        frozen = cost.student_parameters - adapters
        found["weights"] += 4 * adapters
        found["gradients"] -= 4 * frozen
        found["Adam"] -= (2 if of_vsd.optimizer == "adam8bit" else 8) * frozen
    return found
