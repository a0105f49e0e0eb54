"""Random numbers that depend only on the seed, the step and the sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# Keys in place of a sample's number: for the numbers that an update shares, and for the numbers of a part.
_UPDATE, _PART = 2**32 - 1, 2**32 - 2


class Draws:
    """The random numbers of some samples of one update. They depend on the order of the calls.

    Every sample has its own generator, so its numbers do not depend on the process and micro-batch that compute it.
    The generators are on the CPU, so the numbers do not depend on the device.

    Args:
        seed: of the run.
        step: the number of the update.
        first: the first sample's place in the global batch of the update.
        count: number of samples.
        device: of the returned tensors.
    """

    def __init__(self, seed: int, step: int, first: int, count: int, device: torch.device):
        self._keys = [(seed, step, first + i) for i in range(count)]
        self._device = device

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        return [_generator(*key) for key in self._keys]  # on first use: not every method draws by sample

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal numbers, float32 (count, *shape)."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self._generators]).to(self._device)

    def integers(self, low: int, high: int) -> Tensor:
        """Draw uniform integers in low..high-1, int64 (count,)."""
        return torch.cat([torch.randint(low, high, (1,), generator=g) for g in self._generators]).to(self._device)

    def uniform(self) -> Tensor:
        """Draw numbers in [0, 1), float32 (count,)."""
        return torch.cat([torch.rand(1, generator=g) for g in self._generators]).to(self._device)


class SharedDraws:
    """The random numbers that all samples of an update share. They depend on the order of the calls."""

    def __init__(self, seed: int, step: int):
        self._generator = _generator(seed, step, _UPDATE)

    def uniform(self) -> float:
        """Draw one number in [0, 1)."""
        return torch.rand((), generator=self._generator).item()

    def choice(self, values: Sequence[int]) -> int:
        """Draw one of `values`, all equally likely."""
        return values[int(torch.randint(len(values), (), generator=self._generator))]


class Part:
    """The samples that one process computes at once: a micro-batch.

    Args:
        seed: of the run.
        step: the number of the update.
        first: the first sample's place in the global batch of the update.
        size: number of samples.
        total: number of samples in the global batch.
        device: of the random numbers.
    """

    def __init__(self, seed: int, step: int, first: int, size: int, total: int, device: torch.device):
        self.size, self.device = size, device
        self.positions = range(step * total + first, step * total + first + size)  # among all samples of the run
        self.draws = Draws(seed, step, first, size, device)
        self._key = (seed, step, _PART, first)

    @cached_property
    def generator(self) -> torch.Generator:
        """A generator for the whole part, on the CPU. Its numbers depend on the division of the batch into parts."""
        return _generator(*self._key)


class Batch:
    """The samples of one update that this process computes, part by part.

    Args:
        seed: of the run.
        step: the number of the update.
        size: samples of a part.
        parts: number of parts of this process.
        process: the number of this process, from 0.
        processes: how many there are. The parts of all processes alternate in the global batch.
        device: of the random numbers.
    """

    def __init__(self, seed: int, step: int, size: int, parts: int, process: int, processes: int, device: torch.device):
        firsts = [(part * processes + process) * size for part in range(parts)]
        total = size * parts * processes
        self.parts = [Part(seed, step, first, size, total, device) for first in firsts]
        self.shared = SharedDraws(seed, step)


def _generator(*key: int) -> torch.Generator:
    # The key is hashed, so that similar keys do not give similar numbers.
    words = np.random.SeedSequence(key).generate_state(2, np.uint32).tolist()
    return torch.Generator().manual_seed(words[0] << 31 | words[1] >> 1)
