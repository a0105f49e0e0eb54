"""What an update costs, so that all methods get the same budget: counted, not derived."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from tiue.distill.method import Method, Run

_UNETS = ("UNet2DConditionModel", "Predictor")  # the modules through which methods call UNets


@dataclass(frozen=True)
class Cost:
    """Floating point operations of an update, and of its UNets in passes of one picture forward."""

    passes: float
    operations: float


def update_cost(
    run: Run, method: Method, unet: UNet2DConditionModel, shape: tuple[int, int, int], text: torch.Tensor
) -> Cost:
    """Count the cost of an update. This changes the method's weights, so the method is not used any more.

    Args:
        run: the run.
        method: the method.
        unet: the teacher's, to count one pass.
        shape: of its latents, (C, h, w).
        text: a text embedding, (1, L, D).
    """
    latents = torch.zeros(1, *shape, device=text.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(latents, torch.zeros(1, dtype=torch.int64, device=text.device), text)
    one = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        method.update(0, run.batch(0))
    counts = counter.get_flop_counts()
    in_unets = sum(sum(operations.values()) for name, operations in counts.items() if name in _UNETS)
    return Cost(in_unets / one, counter.get_total_flops())
