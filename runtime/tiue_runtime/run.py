"""One request while it runs: progress, previews, timings and cancelling go through this module only."""

import inspect
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol

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
        asked: Any = cancel if isinstance(cancel, type) else getattr(cancel, "is_set", cancel)
        self._asked: Callable[[], bool] | None = asked
        self._callback = callback
        self._timeout = timeout
        if asked is not None and not _takes(asked, 0):
            raise RequestError(
                f"cancel: expected a threading.Event, a function without arguments, or None, got {shorten(cancel)}"
            )
        if callback is not None and not _takes(callback, 3):
            raise RequestError(
                f"callback: expected a function of step, steps and preview, or None, got {shorten(callback)}"
            )
        if timeout is not None and not timeout > 0:
            raise RequestError(f"timeout: expected seconds greater than 0, or None, got {shorten(timeout)}")

    def cancelled(self) -> bool:
        """Say whether the caller wants to stop, or the time is over."""
        return self._is_late() or (self._asked is not None and bool(self._asked()))

    def check(self, what: str) -> None:
        """Raise Cancelled before `what` if the caller wants to stop, or the time is over."""
        if self.cancelled():
            raise self._ended(f"before {what}")

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Time a stage, for example the run of a graph. Raises Cancelled as `check` does."""
        self.check(name)
        begun = time.perf_counter()
        try:
            yield
        except Cancelled as error:
            raise self._ended(f"while {name} ran") from error
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - begun

    def step(self, step: int, steps: int, preview: Callable[[], Float32]) -> None:
        """Report that `step` of `steps` timesteps are done.

        Args:
            step: from 1 to steps.
            steps: N.
            preview: computes an estimate of z_0, float32 (B, C, h, w).
        """
        if self._callback is not None:
            self._callback(step, steps, preview())

    def _is_late(self) -> bool:
        return self._timeout is not None and time.perf_counter() - self.begun > self._timeout

    def _ended(self, when: str) -> Cancelled:
        late = f"timeout: {self._timeout} seconds were over {when}"
        return Cancelled(late if self._is_late() else f"cancelled {when}")


def _takes(function: object, count: int) -> bool:
    """Say whether a function takes `count` arguments. If Python cannot tell, the answer is yes."""
    if not callable(function) or isinstance(function, type) or inspect.iscoroutinefunction(function):
        return False
    try:
        inspect.signature(function).bind(*(None,) * count)
    except TypeError:
        return False
    except ValueError:  # Some functions written in C have no signature.
        return True
    return True
