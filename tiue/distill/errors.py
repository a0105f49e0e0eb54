"""Why a training ended early."""

from __future__ import annotations


class DivergedError(RuntimeError):
    """A loss or a gradient is not finite. The message names the step, the batch and the last checkpoint."""


class StoppedError(RuntimeError):
    """A signal stopped the run. It is saved, and the message says where it resumes.

    Args:
        message: the message.
        number: the number of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number
