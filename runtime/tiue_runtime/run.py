"""One request while it runs: how long each graph took, and whether the caller wants to stop."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol

from tiue_runtime.errors import Cancelled, RequestError, shorten


class Flag(Protocol):
    """Something like threading.Event."""

    def is_set(self) -> bool:
        """Whether to stop."""
        ...


Cancel = Flag | Callable[[], bool]


class Run:
    """The clock and the stop sign of one request."""

    def __init__(self, cancel: Cancel | None) -> None:
        self.timings: dict[str, float] = {}
        self._asked: object = getattr(cancel, "is_set", cancel)
        if cancel is not None and not callable(self._asked):
            raise RequestError(f"cancel: expected a threading.Event or a function, got {shorten(cancel)}")

    def cancelled(self) -> bool:
        """Say whether the caller wants to stop."""
        return callable(self._asked) and bool(self._asked())

    @contextmanager
    def timed(self, graph: str) -> Generator[None]:
        """Add the time spent inside to timings[graph], unless the caller wants to stop. Raises Cancelled."""
        if self.cancelled():
            raise Cancelled(f"cancelled before {graph}")
        start = time.perf_counter()
        yield
        self.timings[graph] = self.timings.get(graph, 0.0) + time.perf_counter() - start
