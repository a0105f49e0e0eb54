"""Signals that ask a run to stop: SIGTERM and SIGINT."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Records a signal inside a `with` block instead of ending the process.

    Ctrl-C after a signal raises KeyboardInterrupt. A second SIGTERM does not: launchers and schedulers send several,
    and the checkpoint that the first one asked for would be lost. Python handles signals on the main thread only. On
    other threads, nothing is recorded.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that arrived; 0: none
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
