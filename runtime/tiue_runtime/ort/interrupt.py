"""Native calls that Ctrl-C, a cancel function and a deadline can reach.

Python handles signals between bytecodes of the main thread. A call into ONNX Runtime takes seconds, so another thread
makes it, and the calling thread waits in short steps.
"""

import atexit
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

from tiue_runtime.errors import Cancelled
from tiue_runtime.host.forks import after_fork

T = TypeVar("T")

POLL_SECONDS = 0.05  # between two calls of `cancelled`
GRACE_SECONDS = 10.0  # wait for a call that was asked to stop; ONNX Runtime stops between two nodes of a graph
EXIT_SECONDS = 1.0  # wait for calls that run, or were left behind, when Python exits

_running: set[threading.Event] = set()  # The end of each native call.
after_fork(_running.clear)  # Threads do not survive a fork.
_exiting = threading.Event()


@atexit.register
def _end_calls() -> None:
    """Stop calls, and wait a moment for them. One that returned while Python shuts down would abort it."""
    _exiting.set()
    until = time.monotonic() + EXIT_SECONDS
    for end in list(_running):
        end.wait(max(until - time.monotonic(), 0.0))


@contextmanager
def _known(what: str) -> Generator[None]:
    """Let `_end_calls` know of a call. Raises Cancelled if Python exits already."""
    end = threading.Event()
    _running.add(end)
    try:
        if _exiting.is_set():
            raise Cancelled(f"cancelled before {what} ran, because Python exits")
        yield
    finally:
        _running.discard(end)
        end.set()


def interruptible(
    function: Callable[[], T],
    what: str,
    *,
    stop: Callable[[], object] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> T:
    """Call a function so that it can be interrupted.

    A call that cannot be stopped is left behind on its thread, which does not keep Python from exiting.

    Args:
        function: the native call.
        what: the name of the work, for the message of Cancelled.
        stop: asks `function`, from another thread, to end early. None if that is impossible: the call then ends on its
            own.
        cancelled: returns whether the caller no longer wants the result. Called every POLL_SECONDS.

    Returns:
        The result of `function`.

    Raises:
        Cancelled: `cancelled` became true first, or Python exits.
        KeyboardInterrupt: Ctrl-C was pressed. `stop` is called in this case as well.
    """
    if cancelled is None and threading.current_thread() is not threading.main_thread():
        with _known(what):
            return function()  # Here nothing can interrupt a call.
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            with _known(what):
                results.append(function())
        except BaseException as error:  # The calling thread raises it.
            errors.append(error)
        finally:
            _idle.append(worker)  # before the caller goes on, or its next call would start another thread
            done.set()

    worker = _free_worker()
    try:
        worker.calls.put(work)  # in this block, or an interrupt right after it would leave the call behind
        while not done.wait(POLL_SECONDS):
            if _exiting.is_set() or (cancelled is not None and cancelled()):
                raise Cancelled(f"cancelled while {what} ran")
    except BaseException:
        if stop is not None:
            stop()
            done.wait(GRACE_SECONDS)
        raise
    if errors:
        raise errors.pop()  # Empty the list: an error in it would be a cycle that keeps the arrays of its frames.
    return results[0]


class _Worker:
    """A thread that makes one call after another. A new thread for each call would take three times as long."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # The thread is a daemon, so that Python can exit even if a call never ends.
        threading.Thread(target=self._work, name="tiue-worker", daemon=True).start()

    def _work(self) -> None:
        while True:
            self.calls.get()()


_idle: list[_Worker] = []
after_fork(_idle.clear)  # Threads do not survive a fork.


def _free_worker() -> _Worker:
    try:
        return _idle.pop()
    except IndexError:
        return _Worker()


def for_each(function: Callable[[T], object], items: Iterable[T], at_once: int) -> None:
    """Call `function` on each item, on `at_once` threads. Ctrl-C does not wait for native calls to end.

    Raises:
        BaseException: the first error of a call. Calls that have not begun by then are skipped.
    """
    rest = list(items)[::-1]
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                item = rest.pop()
            except IndexError:  # Another thread took the last one.
                return
            try:
                with _known("a call"):
                    function(item)
            except BaseException as error:  # The calling thread raises it.
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(rest)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
    except BaseException:
        rest.clear()
        raise
    if errors:
        del errors[1:]
        raise errors.pop()
