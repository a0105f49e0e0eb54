"""A stage of the recipe: one network that minimizes one loss, on the training loop of tiue.distill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evaluation.devices import fastest_precision
from tiue.distill.config import RunConfig
from tiue.distill.draws import Batch
from tiue.distill.loop import train
from tiue.distill.method import Means, Method, Run, Trained
from tiue.distill.optimizers import make_muon
from tiue.distill.runs import check_same_run
from tiue.files import one_line, written_whole

# Of the checkpoints of a run, by file name. Written last, so a run without this file is not finished.
SCORES = "best.json"

# Takes a generator on the CPU and a batch size. Draws a batch, and returns its loss.
Loss = Callable[[torch.Generator, int], Tensor]


def device() -> torch.device:
    """Return the device of the recipe, as accelerate chooses it."""
    return PartialState().device


def on_device(generator: torch.Generator) -> torch.Generator:
    """Return a generator on the device of the recipe. The given one, on the CPU, decides its seed."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device()).manual_seed(seed)


def precision() -> str:
    """Return `mixed_precision` of the stages."""
    return fastest_precision(device())


def autocast() -> torch.autocast:
    """Compute in the precision of the stages."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision() == "bf16")


def spaced(iterations: int) -> dict[str, int]:
    """Return the settings of a run whose last four checkpoints are to be scored, a tenth of the run apart."""
    return {"checkpoint_every": max(1, iterations // 10), "keep": 4}


class _Objective(nn.Module):
    """A loss as a module. DDP wraps it, so that processes exchange gradients for any use of the network."""

    def __init__(self, network: nn.Module, loss: Loss):
        super().__init__()
        self.network, self._loss = network, loss

    def forward(self, generator: torch.Generator, count: int) -> Tensor:
        return self._loss(generator, count)


class Stage(Method):
    """Minimizes a loss.

    Args:
        run: the run.
        name: of the stage.
        network: on the device. All its parameters are trained.
        loss: of `network`.
        optimizer: of `network`.
    """

    result = "weights.safetensors"
    columns = ("loss",)

    def __init__(self, run: Run, name: str, network: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer):
        self.name, self.model = name, network.train()
        self._objective = Trained(run.accelerator, _Objective(network, loss), optimizer, run.config.grad_clip)
        self.networks = {"model": self._objective}

    def update(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Update the network once."""
        means = Means()
        for part in self._objective.accumulating(batch.parts):
            loss = self._objective(part.generator, part.size)
            self._objective.backward(loss / len(batch.parts))
            means.add(len(batch.parts), loss=loss)
        self._objective.step()
        return means.values

    def save(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write the weights."""
        with written_whole(path) as temporary:
            save_file(dict(weights), temporary)


def minimize(
    network: nn.Module, loss: Loss, out: Path, *, muon: float = 0.0, weight_decay: float = 0.0, **settings: Any
) -> None:
    """Train `network` to minimize a loss, in place. All learning rates fall linearly to zero.

    Args:
        network: on the device of the recipe.
        loss: of `network`.
        out: directory of the run. A stopped run resumes, and a finished one is not repeated.
        muon: learning rate of Muon, for convolutions and matrices. 0: AdamW trains everything.
        weight_decay: of the optimizer.
        settings: of RunConfig. `learning_rate` is AdamW's.

    Raises:
        ValueError: the directory has a run of other settings, or its result is damaged.
    """
    path, identity = out / Stage.result, {"muon": str(muon), "weight_decay": str(weight_decay)}
    settings = {"mixed_precision": precision(), "learning_rate_decay": "linear", "keep": 1} | settings
    config = RunConfig(**settings)
    if path.exists():
        check_same_run(out, config, identity, free=("mixed_precision",))
    else:
        run = Run(out, config)
        rate = config.learning_rate
        if muon:
            optimizer = make_muon(network, muon, rate, weight_decay, mixed_precision=config.mixed_precision)
        else:
            optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=weight_decay)
        run.identify(**identity)
        train(run, Stage(run, out.name, network, loss, optimizer))
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: expected the weights of the stage {out.name}: {one_line(error)}") from error
    network.eval()
