"""Tensors that several processes hold in shards (FSDP), as whole ones and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.training_utils import EMAModel
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


class Tensors:
    """A list of tensors as a state: of a frozen network with adapters, only what is trained is kept."""

    def __init__(self, tensors: Iterable[Tensor]):
        self._tensors = list(tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by position."""
        return {str(index): whole(tensor.detach()) for index, tensor in enumerate(self._tensors)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the values in."""
        for index, tensor in enumerate(self._tensors):
            tensor.copy_(shard_like(state[str(index)], tensor))


class Average:
    """An averaged network as a state of whole tensors."""

    def __init__(self, ema: EMAModel):
        self._ema = ema

    def state_dict(self) -> dict[str, Any]:
        """As diffusers', but for shards."""
        return whole(self._ema.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state of whole tensors."""
        now = self._ema.shadow_params
        values = [shard_like(v, old).to(old.device) for v, old in zip(state["shadow_params"], now, strict=True)]
        self._ema.load_state_dict(state | {"shadow_params": values})


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
