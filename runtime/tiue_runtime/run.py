"""One request while it runs: progress, timings and cancelling go through this module only."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from tiue_runtime.errors import Cancelled, RequestError, shorten
from tiue_runtime.progress import SHARES, Preview, Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Callback = Callable[[Progress], object]


class Flag(Protocol):
    """Something like threading.Event."""

    def is_set(self) -> bool:
        """Say whether to stop."""
        ...


Cancel = Flag | Callable[[], bool]


class Run:
    """Progress, cancelling and timings of one request."""

    def __init__(
        self, cancel: Cancel | None = None, callback: Callback | None = None, timeout: float | None = None
    ) -> None:
        """Begin a request.

        Args:
            cancel: an event, or a function that returns whether to stop.
            callback: called with a Progress by `report`. If it returns True, the request is cancelled.
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
        self._stages: Collection[str] = tuple(SHARES)
        self._preview: Preview | None = None
        self._estimate: Callable[[], NDArray[np.float32]] | None = None
        self._fraction = 0.0
        self.raised: BaseException | None = None  # by the callback: never to be taken for an error of a graph
        if asked is not None and not _takes(asked, 0):
            raise RequestError(
                f"cancel: expected a threading.Event, a function without arguments, or None, got {shorten(cancel)}"
            )
        if callback is not None and not _takes(callback, 1):
            raise RequestError(f"callback: expected a function of one Progress, or None, got {shorten(callback)}")
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

    def expect(self, stages: Collection[str], preview: Preview | None = None) -> None:
        """Set the stages that this request goes through, in their order, and the maker of previews."""
        self._stages, self._preview = stages, preview

    def end(self) -> None:
        """Let go of the maker of previews, which refers to this run: a cycle would keep the pipeline in memory."""
        self._preview = None

    def report(
        self, stage: str, step: int, steps: int, estimate: Callable[[], NDArray[np.float32]] | None = None
    ) -> None:
        """Tell the callback that a part of the work is done.

        Args:
            stage: the name of a graph.
            step: finished parts of the stage, from 1 to steps.
            steps: parts of the stage.
            estimate: computes an estimate of z_0, float32 (B, C, h, w). None: the last estimate stays.

        Raises:
            Cancelled: the callback returned True.
        """
        if self._callback is None:
            return
        self._estimate = estimate or self._estimate
        shares = {name: SHARES[name] for name in self._stages}
        before = sum(list(shares.values())[: list(shares).index(stage)])
        done = (before + shares[stage] * step / steps) / sum(shares.values())
        # A stage that begins again, in smaller parts after running out of memory, does not take anything back.
        self._fraction = max(self._fraction, done)
        seconds = time.perf_counter() - self.begun
        progress = Progress(stage, step, steps, self._fraction, seconds, self._estimate, self._preview)
        try:
            stop = self._callback(progress)
        except BaseException as error:
            self.raised = error
            raise
        if type(stop).__name__ in ("bool", "bool_") and stop:  # Python's True or numpy's, not any truthy value
            raise Cancelled(f"cancelled by the callback after {stage}, {step} of {steps}")

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
