"""Running contenders side by side, each in a process of its own, taking turns."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .machine import gpu_used_bytes

ROOT = Path(__file__).resolve().parents[1]
# Relative root-mean-square difference of first noise predictions. Another network's differ by about 1.4, float16's from
# float32's by less than 0.01.
SAME_NETWORK = 0.05


class BenchmarkError(Exception):
    """A contender could not be made or run, or does not compute what the others do."""


@dataclass(frozen=True)
class Conditions:
    """What every contender is given."""

    device: str
    threads: int
    shape: tuple[int, int, int]  # of one image's latents
    pixels_per_latent: int
    steps: int
    batches: tuple[int, ...]
    runs: int


@dataclass
class Measured:
    """What one contender took, in seconds and bytes. Peaks are of resident memory."""

    disk_bytes: int
    loaded_peak_bytes: int = 0
    peak_bytes: int = 0
    gpu_bytes: int = 0  # growth of the GPU's used memory while this contender, and no other, was at work
    start_seconds: list[float] = field(default_factory=list)  # from starting Python to loaded, files cached
    first_seconds: dict[int, list[float]] = field(default_factory=dict)  # by batch, as the next two
    seconds: dict[int, list[float]] = field(default_factory=dict)
    stages: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    difference: float = 0.0  # of the first noise prediction from the first contender's, relative
    timesteps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A contender: what `contender.make` is given, besides the conditions."""

    kind: str
    directory: Path
    options: Mapping[str, Any] = field(default_factory=dict)


def compare(
    entries: Mapping[str, Entry], conditions: Conditions, *, apart: bool, progress: Callable[[str], None]
) -> dict[str, Measured]:
    """Check and time every entry; the first is what the others' predictions are compared with.

    apart: run one process at a time, started anew for each timed run, instead of all of them together.
    Raises BenchmarkError.
    """
    measured = {name: Measured(sum(f.stat().st_size for f in _files(e.directory))) for name, e in entries.items()}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        reference = scratch / f"{next(iter(entries))}.npy"

        @contextmanager
        def ready(name: str) -> Iterator[_Process]:
            progress(f"loading {name}")
            with _Process(name, entries[name], conditions, measured[name], scratch) as process:
                process.first_pictures()
                if not measured[name].timesteps:
                    process.check_same(reference)
                    progress(f"{name}: timesteps {measured[name].timesteps}, {measured[name].difference:.0e} apart")
                yield process

        if apart:
            for i in range(conditions.runs):
                progress(f"round {i + 1} of {conditions.runs}")
                for name in entries:
                    with ready(name) as process:
                        process.timed_pictures()
        else:
            with ExitStack() as stack:
                processes = [stack.enter_context(ready(name)) for name in entries]
                for i in range(conditions.runs):
                    progress(f"round {i + 1} of {conditions.runs}")
                    for process in processes:
                        process.timed_pictures()
    if len({tuple(m.timesteps) for m in measured.values()}) > 1:
        raise BenchmarkError(f"timesteps differ: { ({name: m.timesteps for name, m in measured.items()}) }")
    return measured


class _Process:
    """A running contender, which writes what it takes into its Measured."""

    def __init__(self, name: str, entry: Entry, conditions: Conditions, measured: Measured, scratch: Path):
        self._name, self._conditions, self._measured = name, conditions, measured
        self._eps, self._log = scratch / f"{name}.npy", scratch / f"{name}.log"
        given = {"kind": entry.kind, "directory": str(entry.directory), "options": dict(entry.options)}
        given |= {"device": conditions.device, "threads": conditions.threads}
        self._command = [sys.executable, "-m", "benchmarks.contender", json.dumps(given)]
        for file in _files(entry.directory):  # from the disk now, so that no contender pays for being the first
            with file.open("rb") as stream:
                while stream.read(2**24):
                    pass

    def __enter__(self) -> "_Process":
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self._watching_gpu(), self._log.open("w") as log:
            start = time.perf_counter()
            self._process = subprocess.Popen(self._command, cwd=ROOT, stderr=log, **pipes)
            try:
                self._measured.loaded_peak_bytes = self._reply()["peak_bytes"]
            except BaseException:
                self.__exit__()
                raise
            self._measured.start_seconds.append(time.perf_counter() - start)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def first_pictures(self) -> None:
        """The first picture of each batch size, which is slower, and whose shape is checked."""
        c = self._conditions
        for batch in c.batches:
            reply = self._ask("picture", batch)
            height, width = (size * c.pixels_per_latent for size in c.shape[1:])
            if reply["shape"] != [batch, height, width, 3]:
                raise BenchmarkError(f"{self._name}: expected {height}x{width} images, got shape {reply['shape']}")
            self._measured.first_seconds.setdefault(batch, []).append(reply["seconds"])

    def check_same(self, reference: Path) -> None:
        """Compare the first noise prediction with the one in `reference`, which is this one's if it is the first."""
        self._measured.timesteps = self._ask("eps", 1, save=str(self._eps))["timesteps"]
        eps, expected = np.load(self._eps), np.load(reference)
        difference = float(np.sqrt(np.mean((eps - expected) ** 2) / np.mean(expected**2)))
        if not difference < SAME_NETWORK:
            raise BenchmarkError(
                f"{self._name}: its first noise prediction is {difference:.2f} (relative) from {reference.stem}'s, so "
                "they are different networks. Remove what was made from other weights, or name another --work"
            )
        self._measured.difference = difference

    def timed_pictures(self) -> None:
        """One request for each batch size."""
        for batch in self._conditions.batches:
            reply = self._ask("picture", batch)
            self._measured.seconds.setdefault(batch, []).append(reply["seconds"])
            self._measured.stages.setdefault(batch, []).append(reply["stages"])

    def _ask(self, what: str, batch: int, **more: Any) -> dict[str, Any]:
        request = {"do": what, "shape": self._conditions.shape, "batch": batch, "steps": self._conditions.steps}
        assert self._process.stdin is not None
        with self._watching_gpu():
            with suppress(BrokenPipeError):  # it ended: the missing reply says so
                print(json.dumps(request | more), file=self._process.stdin, flush=True)
            reply = self._reply()
        if not reply["finite"]:
            raise BenchmarkError(f"{self._name}: {what} has NaN or infinity")
        return reply

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise BenchmarkError(f"{self._name} ended with status {self._process.wait()} and said: {said[-1]}")
        reply = json.loads(line)
        self._measured.peak_bytes = max(self._measured.peak_bytes, reply["peak_bytes"])
        return reply

    @contextmanager
    def _watching_gpu(self) -> Iterator[None]:
        watched = self._conditions.device != "cpu"
        before = gpu_used_bytes() if watched else 0
        yield
        self._measured.gpu_bytes += gpu_used_bytes() - before if watched else 0


def table(measured: Mapping[str, Measured]) -> str:
    """Rows by contender and batch, then the seconds of each stage."""
    gpu = any(m.gpu_bytes for m in measured.values())
    heads = ["contender", "batch", "median s", "least .. most", "first s", "start s", "loaded GiB", "peak GiB"]
    rows = [[*heads, *(["GPU GiB"] if gpu else []), "disk GiB", "eps apart"]]
    for name, m in measured.items():
        for batch, seconds in m.seconds.items():
            first, start = statistics.median(m.first_seconds[batch]), statistics.median(m.start_seconds)
            times = [f"{statistics.median(seconds):.3g}", f"{min(seconds):.3g} .. {max(seconds):.3g}"]
            times += [f"{first:.3g}", f"{start:.3g}"]
            memory = [m.loaded_peak_bytes, m.peak_bytes, *([m.gpu_bytes] if gpu else []), m.disk_bytes]
            rows.append([name, str(batch), *times, *(f"{b / 2**30:.2f}" for b in memory), f"{m.difference:.0e}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, m in measured.items():
        for batch, stages in m.stages.items():
            medians = (f"{s} {statistics.median(run[s] for run in stages):.3g}" for s in stages[0])
            lines.append(f"{name}, batch {batch}, median seconds: {', '.join(medians)}")
    return "\n".join(lines)


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
