"""Whether contenders compute the same: one network's predictions, and pictures that differ by rounding alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Relative root-mean-square difference of first noise predictions. Another network's differ by about 1.4, float16's from
# float32's by less than 0.01.
SAME_NETWORK = 0.05
# dB. Other weights or another sampler give about 15, float16 above 50, float32 above 90.
SAME_PICTURE = 30.0
# JSON has no infinity for arrays that are equal.
_EQUAL = 200.0

Float32 = NDArray[np.float32]


class BenchmarkError(Exception):
    """A contender does not compute what the others do, or what was asked for cannot be measured."""


@dataclass(frozen=True)
class Compared:
    """How far an output is from another contender's."""

    reference: str  # that contender
    value: float  # relative root-mean-square difference of "eps"; dB of "latents" and "picture"


class Agreement:
    """The first output of each kind and group, with which the others of the group are compared."""

    def __init__(self) -> None:
        self._references: dict[tuple[str, ...], tuple[str, Float32]] = {}
        self._timesteps: tuple[str, list[int]] | None = None

    def check(self, name: str, what: str, group: tuple[str, ...], array: Float32) -> Compared | None:
        """Compare a contender's "eps", "latents" or "picture"; None for the first of its group.

        Raises BenchmarkError if it is too far from the group's first.
        """
        reference, expected = self._references.setdefault((what, *group), (name, array))
        if reference == name:
            return None
        if array.shape != expected.shape:
            raise BenchmarkError(f"{name}: {what} of shape {array.shape}, {reference}'s has {expected.shape}")
        if what == "eps":
            difference = float(np.sqrt(np.mean((array - expected) ** 2) / np.mean(expected**2)))
            if not difference < SAME_NETWORK:
                raise BenchmarkError(
                    f"{name}: its first noise prediction is {difference:.2f} (relative) from {reference}'s, so they "
                    "are different networks. Remove what was made from other weights, or name another --work"
                )
            return Compared(reference, difference)
        decibels = psnr(array, expected)
        if not decibels > SAME_PICTURE:
            raise BenchmarkError(
                f"{name}: its {what} is {decibels:.1f} dB from {reference}'s, expected more than {SAME_PICTURE:.0f}: "
                "one of the two computes something else"
            )
        return Compared(reference, decibels)

    def check_timesteps(self, name: str, timesteps: list[int]) -> None:
        """Raise BenchmarkError if they are not the first contender's. None at all are those that cannot be known."""
        if timesteps:
            reference, expected = self._timesteps = self._timesteps or (name, timesteps)
            if timesteps != expected:
                raise BenchmarkError(f"{name}: timesteps {timesteps}, {reference}'s are {expected}")


def psnr(array: Float32, expected: Float32) -> float:
    """Peak signal-to-noise ratio in dB, the peak being the range of `expected`; at most 200, also for equal arrays."""
    error = float(np.mean((array.astype(np.float64) - expected) ** 2))
    peak = float(expected.max() - expected.min())
    if not (error and peak):
        return 0.0 if error else _EQUAL
    return float(min(10 * np.log10(peak**2 / error), _EQUAL))
