"""The optimizers of a distillation."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


def check_optimizer(name: str, accelerator: Accelerator) -> None:
    """Raise ValueError for an optimizer that is not installed or does not work with accelerate's configuration."""
    if name != "adam8bit":
        return
    if accelerator.distributed_type == DistributedType.FSDP:  # It would read past the end of a shard.
        raise ValueError("`optimizer` adam8bit does not work with FSDP: bitsandbytes takes no shards")
    _adam8bit()


def make_optimizer(
    name: str, parameters: list[nn.Parameter], learning_rate: float, fused: bool = True
) -> torch.optim.Optimizer:
    """Make an optimizer.

    Args:
        name: "adam" for torch's Adam; "adam8bit" for bitsandbytes' Adam, which keeps its averages in 8 bits.
        parameters: the parameters to update.
        learning_rate: the learning rate.
        fused: whether torch's Adam is fused. bitsandbytes' always is.

    Returns:
        The optimizer.

    Raises:
        ValueError: bitsandbytes is needed but not installed.
    """
    if name == "adam":
        return torch.optim.Adam(parameters, learning_rate, fused=fused)
    optimizer = _adam8bit()(parameters, learning_rate)
    # Its step makes every weight contiguous, which would undo channels_last.
    last = [p for p in parameters if p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)]
    optimizer.register_step_post_hook(lambda *_: _to_channels_last(last))
    return optimizer


def _adam8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as error:
        raise ValueError("`optimizer` adam8bit needs bitsandbytes: pip install bitsandbytes") from error
    return Adam8bit


def _to_channels_last(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
