"""A method of a few lines on the training loop, and a program that trains it: `python toy.py OUT ITERATIONS`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tiue.distill.config import RunConfig
from tiue.distill.loop import train
from tiue.distill.method import Means, Method, Run, Trained


class Regression(Method):
    """Learns a rotation of the plane from noisy points."""

    name, result, columns = "toy", "weights.safetensors", ("loss",)

    def __init__(self, run):
        torch.manual_seed(0)
        self.model = nn.Linear(2, 2, bias=False)
        optimizer = torch.optim.AdamW(self.model.parameters(), run.config.learning_rate)
        self.network = Trained(run.accelerator, self.model, optimizer, run.config.grad_clip)
        self.networks = {"model": self.network}

    def update(self, step, batch):
        means = Means()
        for part in self.network.accumulating(batch.parts):
            x = part.draws.normal((2,))
            y = x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) + 0.1 * part.draws.normal((2,))
            loss = (self.network(x) - y).square().mean()
            self.network.backward(loss / len(batch.parts))
            means.add(len(batch.parts), loss=loss)
        self.network.step()
        return means.values

    def save(self, weights, path):
        save_file(dict(weights), path)


def run(out: Path, iterations: int, **changes) -> Path:
    settings = {"batch_size": 4, "learning_rate": 0.05, "checkpoint_every": 3, "ema_decay": 0.9}
    made = Run(out, RunConfig(iterations=iterations, **(settings | changes)))
    return train(made, Regression(made), progress=False)


if __name__ == "__main__":
    out, iterations, batch_size = sys.argv[1:]
    run(Path(out), int(iterations), batch_size=int(batch_size))
