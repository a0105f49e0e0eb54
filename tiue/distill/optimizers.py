"""The optimizers of a distillation, and Muon, for networks that are trained from nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn


def check_optimizer(name: str, accelerator: Accelerator) -> None:
    """Raise ValueError for an optimizer that is not installed or does not work with accelerate's configuration."""
    if name != "adam8bit":
        return
    if accelerator.distributed_type == DistributedType.FSDP:  # It would read past the end of a shard.
        raise ValueError("`optimizer` adam8bit does not work with FSDP: bitsandbytes takes no shards")
    _adam8bit()


def make_optimizer(
    name: str, network: nn.Module, learning_rate: float, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """Make the optimizer of those parameters of a network that require gradients.

    Args:
        name: "adam" for torch's Adam; "adam8bit" for bitsandbytes' Adam, which keeps its averages in 8 bits.
        network: the network.
        learning_rate: the learning rate.
        accelerator: accelerate's, with or without a scaler for fp16.

    Returns:
        The optimizer.

    Raises:
        ValueError: bitsandbytes is needed but not installed.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if name == "adam":
        # A fused optimizer skips an overflow in fp16 by itself, and accelerate does not notice.
        return torch.optim.Adam(parameters, learning_rate, fused=accelerator.scaler is None)
    optimizer = _adam8bit()(parameters, learning_rate)
    # Its step makes every weight contiguous, which would undo channels_last.
    last = [p for p in parameters if p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)]
    optimizer.register_step_post_hook(lambda *_: _to_channels_last(last))
    return optimizer


def make_muon(
    network: nn.Module,
    learning_rate: float,
    adam_learning_rate: float,
    weight_decay: float = 0.0,
    *,
    mixed_precision: str = "no",
) -> torch.optim.Optimizer:
    """Make the optimizer of a new network: Muon for convolutions and matrices, AdamW for vectors and numbers.

    Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one. All directions of a
    weight are then learned at the same pace. A convolution counts as a matrix with one row per output channel.

    Args:
        network: the network. All its parameters that require gradients are trained.
        learning_rate: of Muon.
        adam_learning_rate: of AdamW.
        weight_decay: of both, times the learning rate, per update.
        mixed_precision: of the run. With "bf16", the orthogonal matrix is computed in bfloat16, else in float32. CPUs
            without bfloat16 instructions would take most of an update to emulate them.

    Returns:
        The optimizer.

    Raises:
        ValueError: pytorch_optimizer is not installed.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    rest = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [
        {"params": matrices, "use_muon": True, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": rest, "use_muon": False, "lr": adam_learning_rate, "weight_decay": weight_decay},
    ]
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    return _muon(dtype)([group for group in groups if group["params"]])


def _muon(dtype: torch.dtype) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """Return pytorch_optimizer's Muon, with Newton-Schulz iterations in `dtype`."""
    try:
        from pytorch_optimizer import Muon
        from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
    except ImportError as error:
        raise ValueError("Muon needs pytorch_optimizer: pip install pytorch_optimizer") from error

    class MuonIn(Muon):
        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
            options = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": dtype}
            return [zero_power_via_newton_schulz_5(update.flatten(1), **options) for update in updates]

    return MuonIn


def _adam8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as error:
        raise ValueError("`optimizer` adam8bit needs bitsandbytes: pip install bitsandbytes") from error
    return Adam8bit


def _to_channels_last(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
