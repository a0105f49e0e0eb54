"""Count the floating point operations of the UNet's halves, from shapes alone, without weights."""

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from tiue.schedule import closed_form
from tiue.unet import TiUE

_TEXT_LENGTH = 77


def unet_flops(pipeline: Path, shape: tuple[int, int, int], batch: int, steps: int) -> tuple[int, int]:
    """Count the operations of both halves, before anything is hoisted.

    A multiplication and an addition count as two. Only matrix products, convolutions and attention are counted.

    Args:
        pipeline: a diffusers pipeline directory.
        shape: (C, h, w) of one picture's latents.
        batch: B.
        steps: N.

    Returns:
        The operations of one encoder run, and of the decoder at all N timesteps.
    """
    unet_config, scheduler_config = (
        json.loads((pipeline / name).read_text(encoding="utf-8"))
        for name in ("unet/config.json", "scheduler/scheduler_config.json")
    )
    schedule = closed_form(scheduler_config, steps)
    with torch.device("meta"), torch.inference_mode():
        tiue = TiUE(UNet2DConditionModel.from_config(unet_config), schedule, schedule.timesteps[0])
        text = torch.empty(batch, _TEXT_LENGTH, unet_config["cross_attention_dim"])
        with FlopCounterMode(display=False) as encoding:
            features = tiue.encode(torch.empty(batch, *shape), text)
        with FlopCounterMode(display=False) as decoding:
            tiue.decode(features, torch.empty(steps, dtype=torch.int64), text)
    return encoding.get_total_flops(), decoding.get_total_flops()
