"""One request while it runs: the only way in which its stages report, are timed, and are told to stop."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.errors import Cancelled, RequestError, shorten

Float32 = NDArray[np.float32]
Callback = Callable[[int, int, Float32], object]


class Flag(Protocol):
    """Something like threading.Event."""

    def is_set(self) -> bool:
        """Say whether to stop."""
        ...


Cancel = Flag | Callable[[], bool]


class Run:
    """Progress, previews, cancelling and timings of one request."""

    def __init__(
        self, cancel: Cancel | None = None, callback: Callback | None = None, timeout: float | None = None
    ) -> None:
        """Begin a request.

        Args:
            cancel: an event, or a function that returns whether to stop.
            callback: called as callback(step, steps, preview) by `step`.
            timeout: seconds from now after which the request stops, or None.

        Raises:
            RequestError: an argument is of another type.
        """
        self.begun = time.perf_counter()
        self.timings: dict[str, float] = {}  # seconds, by stage
        self._asked: object = getattr(cancel, "is_set", cancel)
        self._callback = callback
        self._timeout = timeout
        if cancel is not None and not callable(self._asked):
            raise RequestError(f"cancel: expected a threading.Event or a function, got {shorten(cancel)}")
        if callback is not None and not callable(callback):
            raise RequestError(f"callback: expected a function or None, got {shorten(callback)}")
        is_number = isinstance(timeout, int | float | np.number) and not isinstance(timeout, bool)
        if timeout is not None and not (is_number and timeout > 0):
            raise RequestError(f"timeout: expected seconds greater than 0, or None, got {shorten(timeout)}")

    @property
    def wants_previews(self) -> bool:
        """Whether somebody looks at previews."""
        return self._callback is not None

    def cancelled(self) -> bool:
        """Say whether the caller wants to stop, or the time is over."""
        if self._timeout is not None and time.perf_counter() - self.begun > self._timeout:
            return True
        return callable(self._asked) and bool(self._asked())

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Time a stage, such as the run of a graph. Raises Cancelled instead of beginning it if the caller wants so."""
        if self.cancelled():
            raise Cancelled(f"cancelled before {name}")
        begun = time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - begun

    def step(self, step: int, steps: int, preview: Callable[[], Float32]) -> None:
        """Report that `step` of `steps` timesteps are done.

        Args:
            step: from 1 to steps.
            steps: N.
            preview: computes the latents (B, C, h, w) as far as they are known.
        """
        if self._callback is not None:
            self._callback(step, steps, preview())
