"""The memory that runs of graphs take, measured and fitted, so that the runtime can choose a mode that fits."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from tiue_runtime.bundle import CUDA, TEXT_ENCODER, UNET_ENCODER, MemoryUse
from tiue_runtime.host import memory

T = TypeVar("T")
Array = NDArray[Any]
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Only Linux lets a process reset its peak.


@dataclass(frozen=True)
class GraphRun:
    """The size of one run of a graph, and the memory that it took beyond the weights."""

    variant: str
    graph: str
    rows: int  # k*B of the decoder, B of other graphs
    latents: int  # h*w
    bytes: int


def measured(run: Callable[[], T]) -> tuple[T, int | None]:
    """Call a function and measure the memory that it takes.

    Returns:
        The result of `run`, and the bytes that the process had at its peak beyond those it had before; None where the
        system does not tell.
    """
    try:
        _RESET.write_text("5")
    except OSError:
        return run(), None
    memory.give_back()  # Collecting cycles first would take longer than many runs.
    before = _status("VmRSS")
    _RESET.write_text("5")
    result = run()
    return result, max(_status("VmHWM") - before, 0)


def fit_runs(runs: Sequence[GraphRun]) -> dict[str, dict[str, MemoryUse]]:
    """Fit the memory of every graph whose batch the runtime can divide, for the variants that run on the CPU.

    Returns:
        Estimates by variant and graph, as in a manifest. Empty where the system does not tell.
    """
    by_graph: dict[tuple[str, str], list[GraphRun]] = {}
    for run in runs:
        if run.variant != CUDA and run.graph not in (TEXT_ENCODER, UNET_ENCODER):
            by_graph.setdefault((run.variant, run.graph), []).append(run)
    estimates: dict[str, dict[str, MemoryUse]] = {}
    for (variant, graph), runs_of_graph in by_graph.items():
        estimates.setdefault(variant, {})[graph] = fit(runs_of_graph)
    return estimates


def fit(runs: Sequence[GraphRun]) -> MemoryUse:
    """Fit the estimate of one graph's memory, with both terms at least 0.

    Of several runs of one size, the one that took the most for a row counts: the others found memory already taken.
    """
    most: dict[int, float] = {}
    for run in runs:
        most[run.latents] = max(most.get(run.latents, 1.0), run.bytes / run.rows)
    sizes, bytes_of_a_row = np.array(list(most)), np.array(list(most.values()))
    terms: Array = np.stack([sizes, sizes**2], axis=1) / bytes_of_a_row[:, None]  # relative to the measured values
    solved = cast(Array, np.linalg.lstsq(terms, np.ones(len(most)), rcond=None)[0])
    # Where the best solution has a negative term, one of the terms is 0.
    candidates: list[Array] = [solved, *(np.eye(2)[i] / terms[:, i].mean() for i in (0, 1))]
    linear, squared = min((c for c in candidates if np.all(c >= 0)), key=lambda c: _furthest(terms, c))
    return MemoryUse(float(linear), float(squared))


def _furthest(terms: Array, candidate: Array) -> float:
    return float(np.abs(terms @ candidate - 1).max())


def give_back() -> None:
    """Return unused memory to the system, cycles included, where the C library can (glibc)."""
    gc.collect()
    memory.give_back()


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
