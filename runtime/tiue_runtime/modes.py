"""Memory modes: how many timesteps one run of the decoder takes, from the fastest mode to the smallest."""

import warnings
from collections.abc import Callable, Generator
from typing import Literal, TypeVar

from tiue_runtime.errors import LoadingError, OutOfMemoryError

Mode = Literal["parallel", "partial", "sequential"]  # The first is the fastest, the last takes the least memory.
Memory = Literal["auto", "low", Mode]

MODES: dict[Mode, int | None] = {"parallel": None, "partial": 2, "sequential": 1}  # timesteps at once; None is all

Computed = TypeVar("Computed")


def timesteps_at_once(mode: Mode, steps: int) -> int:
    """Return k, the number of timesteps of one decoder run."""
    return min(MODES[mode] or steps, steps)


def lower_mode(mode: Mode, steps: int) -> Mode | None:
    """Return the next mode that takes fewer timesteps at once, or None at the end."""
    modes = list(MODES)
    now = timesteps_at_once(mode, steps)
    return next((m for m in modes[modes.index(mode) :] if timesteps_at_once(m, steps) < now), None)


class Ladder:
    """The modes of one request. After a run that did not fit into memory, it goes down to the next mode.

    Args:
        mode: the first one to try.
        steps: N, all timesteps of the request.
    """

    def __init__(self, mode: Mode, steps: int) -> None:
        self.mode: Mode = mode
        self.steps = steps

    @property
    def one_by_one(self) -> bool:
        """Whether each run takes a single timestep, so that its prediction is known by itself."""
        return self.mode == "sequential"

    def runs(self, compute: Callable[[slice], Computed]) -> Generator[tuple[slice, Computed]]:
        """Call `compute` for parts of the timesteps, one after another, until all are done.

        Args:
            compute: takes a slice of 0 .. N. If it raises OutOfMemoryError, it is called again in the next lower mode,
                with a warning.

        Yields:
            Each slice and its result.

        Raises:
            OutOfMemoryError: the lowest mode did not fit, or a graph could not be loaded.
        """
        first = 0
        while first < self.steps:
            now = slice(first, min(first + timesteps_at_once(self.mode, self.steps), self.steps))
            try:
                computed = compute(now)
            except LoadingError:
                raise  # A lower mode does not help.
            except OutOfMemoryError as error:
                lower = lower_mode(self.mode, self.steps)
                if lower is None:
                    raise
                warnings.warn(f"{error} in {self.mode} mode: continuing in {lower} mode", stacklevel=5)
                self.mode = lower
                continue
            yield now, computed
            first = now.stop
