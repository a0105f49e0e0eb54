"""How much memory a run of a graph takes, so that the runtime can choose what fits."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from tiue_runtime.bundle import MemoryUse
from tiue_runtime.host import memory

T = TypeVar("T")
Array = NDArray[Any]
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux alone lets a process reset its peak


def measured(run: Callable[[], T]) -> tuple[T, int | None]:
    """Call `run`. Returns its result and the bytes that the process took at its peak beyond those it had before.

    None where the system does not tell.
    """
    try:
        _RESET.write_text("5")
    except OSError:
        return run(), None
    memory.give_back()  # without cycles, to collect which takes longer than many a run
    before = _status("VmRSS")
    _RESET.write_text("5")
    result = run()
    return result, max(_status("VmHWM") - before, 0)


def fit(uses: Sequence[tuple[int, int, int]]) -> MemoryUse:
    """The estimate that is nearest to measured (rows, h*w, bytes), each of its terms at least 0.

    Of several runs at one size the one that took the most for a row counts: others found memory already taken.
    """
    most: dict[int, float] = {}
    for rows, latents, taken in uses:
        most[latents] = max(most.get(latents, 1.0), taken / rows)
    sizes, bytes_of_a_row = np.array(list(most)), np.array(list(most.values()))
    terms: Array = np.stack([sizes, sizes**2], axis=1) / bytes_of_a_row[:, None]  # as shares of what was measured
    solved = cast(Array, np.linalg.lstsq(terms, np.ones(len(most)), rcond=None)[0])
    # Where the best solution has a negative term, one of them is 0.
    candidates: list[Array] = [solved, *(np.eye(2)[i] / terms[:, i].mean() for i in (0, 1))]
    linear, squared = min((c for c in candidates if np.all(c >= 0)), key=lambda c: _furthest(terms, c))
    return MemoryUse(float(linear), float(squared))


def _furthest(terms: Array, candidate: Array) -> float:
    return float(np.abs(terms @ candidate - 1).max())


def give_back() -> None:
    """Return what is no longer used to the system, cycles included, where the C library can (glibc)."""
    gc.collect()
    memory.give_back()


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
