"""Run contenders in turns, each in a process of its own, and time them."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tiue_runtime.noise import gaussian

from benchmarks.agreement import Agreement, BenchmarkError, Compared
from benchmarks.installed import Installed
from benchmarks.machine import GPUS, Memory, gpu_used_bytes, watching

ROOT = Path(__file__).resolve().parents[1]
SEED = 0  # seed of the first picture; the next has SEED + 1


class CannotRun(Exception):
    """A contender is left out. The message is the reason, in one line."""


@dataclass(frozen=True)
class Conditions:
    """The conditions that are equal for all contenders."""

    threads: int
    shape: tuple[int, int, int]  # (C, h, w) of one picture's latents
    pixels_per_latent: int
    steps: int  # N
    batches: tuple[int, ...]  # pictures per request
    runs: int  # timed rounds

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.shape[1] * self.pixels_per_latent, self.shape[2] * self.pixels_per_latent


@dataclass(frozen=True)
class Entry:
    """A contender: arguments of `contender.make` besides the conditions, and the groups that it is compared in."""

    kind: str
    directory: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    python: str = sys.executable
    algorithm: str = "tiue"  # contenders of one algorithm must make the same latents; all make the same predictions
    vae: str = "kl"  # contenders of one algorithm and one kind of image decoder must make the same pictures
    installed: Installed = field(default_factory=Installed)


@dataclass
class Measured:
    """The cost of one contender, in seconds and bytes."""

    device: str
    installed: Installed
    weights_bytes: int  # size of the files in the directory that it loads
    loaded_peak_bytes: int = 0  # most memory resident, when the model is loaded
    peak_bytes: int = 0  # most memory resident, in all
    anonymous_peak_bytes: int = 0  # the same without pages of files; sampled 20 times a second, on Linux
    gpu_bytes: int = 0  # growth of the GPU's used memory while this contender alone was at work
    load_seconds: list[float] = field(default_factory=list)  # from starting Python to loaded, files cached
    cold_seconds: list[float] = field(default_factory=list)  # from starting Python to the first picture as PNG
    first_seconds: dict[int, list[float]] = field(default_factory=dict)  # of the first request, by batch
    seconds: dict[int, list[float]] = field(default_factory=dict)  # of timed requests, by batch
    stages: dict[int, list[dict[str, float]]] = field(default_factory=dict)  # of the same, by batch, then by stage
    compared: dict[str, Compared] = field(default_factory=dict)  # by "eps", "latents", "picture"
    timesteps: list[int] = field(default_factory=list)  # empty if they are unknown


@dataclass(frozen=True)
class Comparison:
    """The results of all entries."""

    measured: dict[str, Measured]
    skipped: dict[str, str]  # reasons why contenders could not run
    wrong: dict[str, str]  # how outputs of contenders differ from the reference


def compare(
    entries: Mapping[str, Entry],
    conditions: Conditions,
    *,
    apart: bool,
    progress: Callable[[str], None],
    after_round: Callable[[Comparison], None] = lambda _: None,
) -> Comparison:
    """Check and time every entry. A contender whose output is wrong is not timed.

    Args:
        entries: the contenders, by name.
        conditions: the same for all.
        apart: run one process at a time, started anew for each timed run. Otherwise all run side by side.
        progress: called with a line of text for each stage.
        after_round: called with the results so far, after each round.
    """
    agreement, skipped, wrong = Agreement(), dict[str, str](), dict[str, str]()
    measured = {
        name: Measured(e.device, e.installed, sum(f.stat().st_size for f in _files(e.directory)))
        for name, e in entries.items()
    }

    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for batch in {1, *conditions.batches}:
            np.save(_noise(scratch, batch), np.stack([gaussian(SEED + i, conditions.shape) for i in range(batch)]))

        @contextmanager
        def ready(name: str) -> Iterator[_Process]:
            progress(f"loading {name}")
            checked = bool(measured[name].load_seconds)
            with _Process(name, entries[name], conditions, measured[name], scratch) as process:
                process.first_pictures()
                if not checked:
                    process.check(agreement)
                    progress(f"{name}: {_said(measured[name])}")
                yield process

        @contextmanager
        def skipping(name: str) -> Iterator[None]:
            try:
                yield
            except CannotRun as reason:
                skipped[name] = str(reason)
                progress(f"{name} is left out: {reason}")
            except BenchmarkError as error:
                wrong[name] = str(error)
                progress(f"wrong: {error}")

        def so_far() -> Comparison:
            timed = {name: m for name, m in measured.items() if name not in skipped and name not in wrong}
            return Comparison(timed, skipped, wrong)

        with ExitStack() as stack:
            processes: dict[str, _Process] = {}
            for name in () if apart else entries:
                with skipping(name):
                    processes[name] = stack.enter_context(ready(name))
            for i in range(conditions.runs):
                progress(f"round {i + 1} of {conditions.runs}")
                for name in entries:
                    if name not in skipped and name not in wrong:
                        with skipping(name), ready(name) if apart else nullcontext(processes[name]) as process:
                            process.timed_pictures()
                after_round(so_far())
        return so_far()


class _Process:
    """A running contender. It writes its cost into its Measured."""

    def __init__(self, name: str, entry: Entry, conditions: Conditions, measured: Measured, scratch: Path):
        self._name, self._entry, self._conditions, self._measured = name, entry, conditions, measured
        self._scratch = scratch
        self._memory = Memory()
        self._gpu_bytes = 0
        given = {"kind": entry.kind, "directory": str(entry.directory), "options": dict(entry.options)}
        given |= {"device": entry.device, "threads": conditions.threads}
        self._command = [entry.python, "-m", "benchmarks.contender", json.dumps(given)]
        for file in _files(entry.directory):  # Read from the disk now, so that no contender pays for being the first.
            with file.open("rb") as stream:
                while stream.read(2**24):
                    pass

    def __enter__(self) -> "_Process":
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        self._started = time.perf_counter()
        with self._watching_gpu():
            try:
                self._process = subprocess.Popen(self._command, cwd=ROOT, stderr=self._log, **pipes)
            except OSError as error:
                raise CannotRun(f"{self._entry.python}: {error.strerror}") from error
            try:
                self._measured.loaded_peak_bytes = self._reply()["peak_bytes"]
            except BaseException:
                self.__exit__()
                raise
        self._measured.load_seconds.append(time.perf_counter() - self._started)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def first_pictures(self) -> None:
        """Make the first picture of each batch size, which is slower. The very first is written as PNG, and kept."""
        for i, batch in enumerate(self._conditions.batches):
            more = {} if i else {"png": str(self._scratch / "picture.png"), "save": str(self._scratch / "picture.npy")}
            reply = self._ask("picture", batch, **more)
            if not i:
                self._measured.cold_seconds.append(time.perf_counter() - self._started)
            if reply["shape"] != [batch, *self._conditions.size, 3]:
                expected = "{}x{}".format(*self._conditions.size)
                raise BenchmarkError(f"{self._name}: expected {batch} of {expected}, got shape {reply['shape']}")
            self._measured.first_seconds.setdefault(batch, []).append(reply["seconds"])

    def check(self, agreement: Agreement) -> None:
        """Compare the first noise prediction, the latents and the very first picture with those of other contenders."""
        algorithm = self._entry.algorithm
        for what, group in (("eps", ()), ("latents", (algorithm,))):
            file = self._scratch / f"{what}.npy"
            reply = self._ask(what, 1, save=str(file))
            if reply["shape"] is not None:
                self._compare(agreement, what, file, *group)
            self._measured.timesteps = reply.get("timesteps", self._measured.timesteps)
        agreement.check_timesteps(self._name, self._measured.timesteps)
        self._compare(agreement, "picture", self._scratch / "picture.npy", algorithm, self._entry.vae)

    def timed_pictures(self) -> None:
        """Make and time one request for each batch size."""
        for batch in self._conditions.batches:
            reply = self._ask("picture", batch)
            self._measured.seconds.setdefault(batch, []).append(reply["seconds"])
            self._measured.stages.setdefault(batch, []).append(reply["stages"])

    def _compare(self, agreement: Agreement, what: str, file: Path, *group: str) -> None:
        compared = agreement.check(self._name, what, group, np.load(file))
        if compared:
            self._measured.compared[what] = compared

    def _ask(self, what: str, batch: int, **more: Any) -> dict[str, Any]:
        request = {"do": what, "noise": str(_noise(self._scratch, batch)), "steps": self._conditions.steps}
        assert self._process.stdin is not None
        with self._watching_gpu():
            with suppress(BrokenPipeError):  # The process has ended: `_reply` reports it.
                print(json.dumps(request | more), file=self._process.stdin, flush=True)
            reply = self._reply()
        if not reply["finite"]:
            raise BenchmarkError(f"{self._name}: {what} has NaN or infinity")
        return reply

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with watching(self._process.pid, self._memory):
            line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            said = self._log.read().strip().splitlines() or ["nothing"]
            killed = f"killed by {signal.Signals(-status).name}, " if status < 0 else ""
            raise CannotRun(f"{killed}it said: {said[-1]}")
        reply = json.loads(line)
        self._measured.peak_bytes = max(self._measured.peak_bytes, reply["peak_bytes"])
        self._measured.anonymous_peak_bytes = max(self._measured.anonymous_peak_bytes, self._memory.anonymous)
        return reply

    @contextmanager
    def _watching_gpu(self) -> Iterator[None]:
        watched = self._entry.device.startswith(GPUS)
        before = gpu_used_bytes() if watched else 0
        yield
        if watched:
            self._gpu_bytes += gpu_used_bytes() - before
            self._measured.gpu_bytes = max(self._measured.gpu_bytes, self._gpu_bytes)


def _said(measured: Measured) -> str:
    parts = [f"timesteps {measured.timesteps}"] if measured.timesteps else ["unknown predictions"]
    for what, compared in measured.compared.items():
        value = f"{compared.value:.0e}" if what == "eps" else f"{compared.value:.0f} dB"
        parts.append(f"{what} {value} from {compared.reference}'s")
    return ", ".join(parts)


def _noise(scratch: Path, batch: int) -> Path:
    return scratch / f"noise-{batch}.npy"


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
