"""Check that contenders compute the same: one network's predictions, and pictures that differ by rounding alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The largest relative root-mean-square difference of first noise predictions. Predictions of another network differ by
# about 1.4. Those in float16 differ from those in float32 by less than 0.01.
SAME_NETWORK = 0.05
# The least PSNR in dB. Other weights or another sampler give about 15, float16 above 50, float32 above 90.
SAME_PICTURE = 30.0
# The PSNR of equal arrays, because JSON has no infinity.
_EQUAL = 200.0

Float32 = NDArray[np.float32]


class BenchmarkError(Exception):
    """A contender computes something else than the others, or a measurement is impossible."""


@dataclass(frozen=True)
class Compared:
    """The distance of an output from that of another contender."""

    reference: str  # the other contender
    value: float  # relative root-mean-square difference of "eps"; dB of "latents" and "picture"


class Agreement:
    """Compares outputs: the first of each kind and group is the reference for the others of the group."""

    def __init__(self) -> None:
        self._references: dict[tuple[str, ...], tuple[str, Float32]] = {}
        self._timesteps: tuple[str, list[int]] | None = None

    def check(self, name: str, what: str, group: tuple[str, ...], array: Float32) -> Compared | None:
        """Compare an output of a contender with the reference of its group.

        Args:
            name: the contender.
            what: "eps", "latents" or "picture".
            group: outputs of the same `what` and group must agree.
            array: the output, float32 of any shape.

        Returns:
            The distance, or None for the first of a group.

        Raises:
            BenchmarkError: the output has another shape, or is too far from the reference.
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
                    "are different networks. Remove files made from other weights, or use another work directory"
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
        """Raise BenchmarkError if timesteps differ from the first contender's. An empty list means unknown ones."""
        if timesteps:
            reference, expected = self._timesteps = self._timesteps or (name, timesteps)
            if timesteps != expected:
                raise BenchmarkError(f"{name}: timesteps {timesteps}, {reference}'s are {expected}")


def psnr(array: Float32, expected: Float32) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 200. The peak is the range of `expected`."""
    error = float(np.mean((array.astype(np.float64) - expected) ** 2))
    peak = float(expected.max() - expected.min())
    if not (error and peak):
        return 0.0 if error else _EQUAL
    return float(min(10 * np.log10(peak**2 / error), _EQUAL))
