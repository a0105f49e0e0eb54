"""Times of something that torch does on a device."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.comparing import CannotRun

_LEAST = 5  # measurements
_FIRST = 3  # calls that do not count


def milliseconds(run: Callable[[], object], device: str, seconds: float) -> float:
    """Return the median time of a call until the device has finished, in milliseconds.

    Args:
        run: the call.
        device: "cuda" or "cpu".
        seconds: how long calls are repeated, 5 times at least. 0: once is enough.
    """
    for _ in range(_FIRST if seconds else 1):
        run()
    _finish(device)
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < (_LEAST if seconds else 1) or time.perf_counter() < until:
        started = time.perf_counter()
        run()
        _finish(device)
        taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


def recorded(run: Callable[[], object], device: str) -> Callable[[], object]:
    """Record a call as a CUDA graph, and return its replay. On the CPU, return the call itself."""
    if device == "cpu":
        return run
    beside = torch.cuda.Stream()  # CUDA cannot record what a first call does, for example the choice of kernels.
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(_FIRST):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def check_torch(device: str) -> None:
    """Raise CannotRun unless torch has the device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise CannotRun(f"torch {torch.__version__} finds no CUDA device")


def reset_peak(device: str) -> None:
    """Free what torch holds on a GPU without using it, and forget the peak so far."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
