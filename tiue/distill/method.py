"""The interface between the training loop and a method.

A method is a class that derives from `Method`. It makes its networks with their optimizers, each as a `Trained`, and
defines one update. The loop does the rest: resume, signals, log, checkpoints, averaging, sample grids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from tiue.distill import runs
from tiue.distill.config import RunConfig
from tiue.distill.draws import Batch
from tiue.distill.sharding import gather, reshard

_Part = TypeVar("_Part")


class Method(Protocol):
    """The networks that are trained, and their update. All processes of a run make the same method and the same calls.

    Attributes:
        name: one word, for the progress bar and the report.
        result: file name of the run's result.
        model: the network that is averaged and saved at the end. All its parameters are trained.
        networks: all trained networks. Their names also occur in checkpoints and columns. The first one holds `model`.
        columns: the names of the values that `update` may return, in the log's order.
    """

    name: str
    result: str
    model: nn.Module
    networks: Mapping[str, Trained]
    columns: Sequence[str]

    def update(self, step: int, batch: Batch) -> Mapping[str, Tensor]:
        """Update the networks once.

        Args:
            step: the number of finished updates.
            batch: this process's samples of the update, with their random numbers.

        Returns:
            Losses and other scalars, by column. They are averaged over the processes, and must be finite.
        """
        ...

    def save(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write the result of the run. Called at the end, on the main process alone.

        Args:
            weights: the averaged parameters of `model`, whole and on the CPU, by their names in it.
            path: `result` in the directory of the run.
        """
        ...

    def state(self) -> Mapping[str, runs.Stateful]:
        """Return further states for checkpoints, besides networks, optimizers and the average."""
        return {}

    def sample(self) -> Tensor | None:
        """Make sample pictures, uint8 (n, 3, H, W), on the main process. None elsewhere, or without pictures."""
        return None

    def describe(self, batch: Batch) -> str:
        """Describe a batch, for the message of a run that diverged."""
        return ""


class Run:
    """A run: its directory, its settings, and the processes that share the work.

    Args:
        out: directory of the run, the same for all its processes. Nothing is written into it yet.
        config: the settings.

    Raises:
        ValueError: accelerate is configured for something unsupported: DeepSpeed, FSDP 1, or its own accumulation; or
            for a mixed precision that is not the settings'.
    """

    def __init__(self, out: Path, config: RunConfig):
        self.out, self.config = out, config
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with="tensorboard", project_dir=out)
        _check_launch(self.accelerator)
        self.identity: dict[str, str | int | None] = {"processes": self.accelerator.num_processes}

    def identify(self, **identity: str | None) -> None:
        """Record values that must be the same when the run resumes, for example the fingerprint of a network.

        Raises:
            ValueError: the directory holds a run with other settings or another identity.
        """
        self.identity |= identity
        runs.check_same_run(self.out, self.config, self.identity)

    def batch(self, step: int) -> Batch:
        """Make this process's batch of the update after `step` finished ones."""
        config, accelerator = self.config, self.accelerator
        process, processes = accelerator.process_index, accelerator.num_processes
        return Batch(config.seed, step, config.batch_size, config.accumulate, process, processes, accelerator.device)


class Trained:
    """A network with its optimizer, on the devices and processes of a run.

    Args:
        accelerator: of the run. It wraps the network for DDP or FSDP.
        network: on the device of the run. Processes exchange gradients only if it is called as `trained(...)`.
        optimizer: over the parameters of `network` that are to be trained.
        grad_clip: the largest norm of their gradient.
    """

    def __init__(
        self, accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float
    ):
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.parameters: list[nn.Parameter] = [p for p in self.network.parameters() if p.requires_grad]
        self.grad_norm = torch.zeros(())  # of the last update, before clipping
        self._accelerator, self._grad_clip = accelerator, grad_clip
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def __call__(self, *inputs: Any) -> Any:
        """Call the network."""
        return self.network(*inputs)

    @torch.no_grad()
    def evaluate(self, *inputs: Any) -> Any:
        """Call the network without gradients, outside an update."""
        answer = self.network(*inputs)
        reshard(self.network)
        return answer

    def accumulating(self, parts: Sequence[_Part]) -> Iterator[_Part]:
        """Go through the parts of an update. Processes exchange gradients only in the last one."""
        for i, part in enumerate(parts):
            with nullcontext() if i == len(parts) - 1 else self._accelerator.no_sync(self.network):
                yield part

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        self._accelerator.backward(loss)

    def step(self) -> None:
        """Clip the gradient, update the parameters, and begin a new gradient."""
        norm = self._accelerator.clip_grad_norm_(self.parameters, self._grad_clip)
        self.grad_norm = torch.as_tensor(gather(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def skipped(self) -> bool:
        """Whether the last update was skipped because gradients overflowed in fp16."""
        return self.optimizer.step_was_skipped

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def scale_learning_rate(self, factor: float) -> None:
        """Set the learning rate of every group to `factor` times its initial one."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor


class Means:
    """Means of values over the parts of an update."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, parts: int, **values: Tensor) -> None:
        """Add the values of one of `parts` parts."""
        for name, value in values.items():
            before = self.values.get(name, torch.zeros((), device=value.device))
            self.values[name] = before + value.detach().float() / parts


def _check_launch(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    sharded = kind == DistributedType.FSDP
    if not (kind == DistributedType.NO or kind.startswith("MULTI_") or sharded):
        raise ValueError(f"accelerate is configured for {kind.value}; a run is shared by DDP or FSDP 2")
    if sharded and not accelerator.is_fsdp2:
        raise ValueError("accelerate is configured for FSDP 1; set fsdp_version: 2")
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by `accelerate launch`
    if wanted not in ("no", accelerator.mixed_precision):
        raise ValueError(f"accelerate is configured for mixed precision in {wanted}; set `mixed_precision` instead")
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(f"accelerate is configured to accumulate {steps} gradients; set `accumulate` instead")
