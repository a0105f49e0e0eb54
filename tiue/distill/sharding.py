"""Conversion between whole tensors and tensors that several processes hold in shards (FSDP)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def gather(state: Any) -> Any:
    """Replace the sharded tensors of a state by whole ones. All processes of a run must call it at the same time."""
    return tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, state)


def shard_like(value: Any, reference: Tensor) -> Any:
    """Cut a whole tensor of `reference`'s shape to this process's shard. Return anything else unchanged."""
    if isinstance(reference, DTensor) and isinstance(value, Tensor) and value.shape == reference.shape:
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return value


def reshard(network: nn.Module) -> None:
    """Free whole parameters: after a pass without gradients, FSDP would keep the outermost ones whole."""
    if isinstance(network, FSDPModule):
        network.reshard()


class Tensors:
    """A state that holds a list of tensors, for example only the trained parameters of a network."""

    def __init__(self, tensors: Iterable[Tensor]):
        self._tensors = list(tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Gather the tensors, by position."""
        return {str(index): gather(tensor.detach()) for index, tensor in enumerate(self._tensors)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the values of whole tensors into the tensors."""
        for index, tensor in enumerate(self._tensors):
            tensor.copy_(shard_like(state[str(index)], tensor))


class Optimizer:
    """The state of an optimizer, with whole tensors."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, with shards gathered."""
        return gather(self._optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that holds whole tensors."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        parts = {
            index: {name: shard_like(value, parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        self._optimizer.load_state_dict(state | {"state": parts})
