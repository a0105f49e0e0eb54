"""The average of a network over the updates (EMA). A run saves it as its result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from tiue.distill.config import RunConfig
from tiue.distill.sharding import gather, shard_like


class Average:
    """A moving average of the parameters of a network. Checkpoints hold its state.

    Args:
        accelerator: of the run.
        model: the network, after accelerate prepared it.
        config: the settings. With `ema_decay` 0, the average is the network itself.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, config: RunConfig):
        self._parameters = dict(model.named_parameters())
        self._device, self._on_cpu = accelerator.device, config.ema_on_cpu
        self._ema: EMAModel | None = None
        if config.ema_decay:
            self._ema = EMAModel(
                self._parameters.values(),
                decay=config.ema_decay**config.ema_every,
                use_ema_warmup=True,
                power=0.75,
                foreach=not accelerator.is_fsdp2,  # Torch lacks some operations on lists of shards.
            )
            self._ema.to("cpu" if self._on_cpu else self._device)

    @property
    def parameters(self) -> list[Tensor]:
        """The averaged parameters, in shards if the network is sharded."""
        return list(self._parameters.values() if self._ema is None else self._ema.shadow_params)

    @property
    def updates(self) -> int:
        """The number of calls of `follow`."""
        return 0 if self._ema is None else self._ema.optimization_step

    def follow(self) -> None:
        """Move towards the current parameters."""
        if self._ema is None:
            return
        if self._on_cpu:
            self._ema.to(self._device)
        self._ema.step(self._parameters.values())
        if self._on_cpu:
            self._ema.to("cpu")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network its averaged parameters inside a `with` block. Restore its own afterwards."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters.values())
        self._ema.copy_to(self._parameters.values())
        try:
            yield
        finally:
            self._ema.restore(self._parameters.values())

    def weights(self) -> dict[str, Tensor]:
        """Gather the averaged parameters, by name, on the CPU. All processes must call it at the same time."""
        averaged = (gather(parameter.detach()).cpu() for parameter in self.parameters)
        return dict(zip(self._parameters, averaged, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return diffusers' state, with shards gathered."""
        return {} if self._ema is None else gather(self._ema.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that holds whole tensors."""
        if self._ema is not None:
            now = self._ema.shadow_params
            values = [shard_like(v, old).to(old.device) for v, old in zip(state["shadow_params"], now, strict=True)]
            self._ema.load_state_dict(state | {"shadow_params": values})
