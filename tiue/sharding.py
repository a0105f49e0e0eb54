"""Tensors that several processes hold in shards (FSDP), as whole ones and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def whole(state: Any) -> Any:
    """A state with its tensors put together. All processes of a run call it, at the same time."""
    return tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, state)


def shard_like(value: Any, reference: Tensor) -> Any:
    """A whole tensor as this process's shard of one of `reference`'s shape; anything else as it is."""
    if isinstance(reference, DTensor) and isinstance(value, Tensor) and value.shape == reference.shape:
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return value


def reshard(network: nn.Module) -> None:
    """Leave each process its shards: after a pass without gradients, FSDP keeps the outermost parameters whole."""
    if isinstance(network, FSDPModule):
        network.reshard()


class Optimizer:
    """An optimiser as a state of whole tensors."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """As torch's, but for shards."""
        return whole(self._optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state of whole tensors."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        parts = {
            index: {name: shard_like(value, parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        self._optimizer.load_state_dict(state | {"state": parts})
