"""How much memory a run of a graph takes, so that the runtime can choose what fits."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from tiue_runtime.bundle import MemoryUse

T = TypeVar("T")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux alone lets a process reset its peak


def measured(run: Callable[[], T]) -> tuple[T, int | None]:
    """Call `run`. Returns its result and the bytes that the process took at its peak beyond those it had before.

    None where the system does not tell.
    """
    try:
        _RESET.write_text("5")
        before = _status("VmRSS")
    except OSError:
        return run(), None
    result = run()
    return result, max(_status("VmHWM") - before, 0)


def fit(uses: Sequence[tuple[int, int, int]]) -> MemoryUse:
    """The estimate that is nearest to measured (rows, h*w, bytes), each of its terms at least 0."""
    rows, latents, taken = np.array(uses, np.float64).T
    terms = np.stack([rows * latents, rows * latents**2], axis=1)
    candidates = [np.linalg.lstsq(terms / taken[:, None], np.ones(len(uses)), rcond=None)[0]]
    for i in (0, 1):  # where the best has a negative term, one of them is 0
        alone = np.zeros(2)
        alone[i] = np.mean(taken / terms[:, i])
        candidates.append(alone)
    linear, squared = min(
        (c for c in candidates if (c >= 0).all()), key=lambda c: float(np.abs(terms @ c / taken - 1).max())
    )
    return MemoryUse(float(linear), float(squared))


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
