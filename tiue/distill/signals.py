"""Signals that ask a run to stop: SIGTERM and SIGINT."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes a signal inside a `with` block instead of ending the process; a second signal raises KeyboardInterrupt.

    Outside the main thread, where Python handles no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that arrived
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
