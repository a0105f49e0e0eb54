"""Ctrl-C and SIGTERM of a command: they raise, and are remembered.

Python drops what a handler raises inside a destructor or a callback of a weak reference. `check` raises it again.
"""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

_arrived: list[int] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Everything that handles Ctrl-C handles it as well, so nothing stays half written."""


@contextmanager
def handled() -> Generator[None]:
    """Handle both signals inside a `with` block. A signal that is ignored stays so."""
    _arrived.clear()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _remember)
    try:
        yield
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raise KeyboardInterrupt or Terminated if a signal arrived."""
    if _arrived:
        raise Terminated if _arrived[0] == signal.SIGTERM else KeyboardInterrupt


def _remember(number: int, _: object) -> None:
    _arrived.append(number)
    check()
