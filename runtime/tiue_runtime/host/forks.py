"""Forked processes: only the thread that forked exists in them, and locks keep the state that they had."""

import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from weakref import WeakSet


def after_fork(function: Callable[[], object]) -> None:
    """Call a function at the beginning of every forked process. Systems without fork never call it."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


class ForkSafeLock:
    """A lock that is free in a forked process, even if another thread of the parent held it."""

    def __init__(self) -> None:
        self.renew()
        _locks.add(self)

    @contextmanager
    def hold(self) -> Generator[None]:
        """Hold the lock in a `with` block. A block in which its own thread forks ends well in both processes."""
        with self._lock:
            yield

    def renew(self) -> None:
        """Replace the lock by a free one."""
        self._lock = threading.Lock()


_locks: WeakSet[ForkSafeLock] = WeakSet()  # of this process

FILTERS = ForkSafeLock()
"""Whoever changes the filters of warnings holds it, because all threads share them."""


def _renew_all() -> None:
    for lock in list(_locks):
        lock.renew()


after_fork(_renew_all)
