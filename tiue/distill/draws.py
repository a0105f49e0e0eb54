"""Random numbers that depend on the seed, the step and the sample, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STEP = 2**32 - 1  # in the place of a sample: numbers that a whole update shares


class Draws:
    """The numbers of some samples of one update, in the order in which they are asked for.

    Every sample has a generator of its own, so that its numbers are the same whichever process and micro-batch it falls
    to, and on a CPU, so that they do not depend on the device.

    Args:
        seed: of the run.
        step: the update.
        first: the first sample's place in the update's global batch.
        count: of samples.
        device: where the numbers go.
    """

    def __init__(self, seed: int, step: int, first: int, count: int, device: torch.device):
        self._generators = [_generator(seed, step, first + i) for i in range(count)]
        self._device = device

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 [count, *shape]."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self._generators]).to(self._device)

    def integers(self, low: int, high: int) -> Tensor:
        """Uniform int64 [count] in low..high-1."""
        return torch.cat([torch.randint(low, high, (1,), generator=g) for g in self._generators]).to(self._device)


class SharedDraws:
    """Numbers of an update that all its samples share, in the order in which they are asked for."""

    def __init__(self, seed: int, step: int):
        self._generator = _generator(seed, step, _STEP)

    def uniform(self) -> float:
        """One number in [0, 1)."""
        return torch.rand((), generator=self._generator).item()

    def choice(self, values: Sequence[int]) -> int:
        """One of `values`, all as likely."""
        return values[int(torch.randint(len(values), (), generator=self._generator))]


def _generator(seed: int, step: int, sample: int) -> torch.Generator:
    # The words are hashed, so that no two samples are alike.
    words = np.random.SeedSequence((seed, step, sample)).generate_state(2, np.uint32).tolist()
    return torch.Generator().manual_seed(words[0] << 31 | words[1] >> 1)
