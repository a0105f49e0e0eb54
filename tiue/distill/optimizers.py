"""The optimisers that a run can choose from."""

from __future__ import annotations

import torch
from torch import nn


def make_optimizer(
    name: str, parameters: list[nn.Parameter], learning_rate: float, fused: bool = True
) -> torch.optim.Optimizer:
    """Adam of torch ("adam") or, with its averages in 8 bits, of bitsandbytes ("adam8bit", which is fused in any case).

    Raises ValueError without bitsandbytes.
    """
    if name == "adam":
        return torch.optim.Adam(parameters, learning_rate, fused=fused)
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as error:
        raise ValueError("`optimizer` adam8bit needs bitsandbytes: pip install bitsandbytes") from error
    optimizer = Adam8bit(parameters, learning_rate)
    # Its step leaves every weight contiguous, which would be the end of channels_last.
    last = [p for p in parameters if p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)]
    optimizer.register_step_post_hook(lambda *_: _to_channels_last(last))
    return optimizer


def _to_channels_last(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
