"""Workers: processes that run one case after another, with limits of memory and of time."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz.cases import Case

DEADLINE = 30.0  # seconds of a case, of which it needs milliseconds; a machine may be busy
FIRST_DEADLINE = 240.0  # seconds of a worker's first case, which loads libraries
MEMORY = 3 * 2**30  # bytes of addresses beyond those that a worker has after its first case
_CASES = 1500  # of one worker, so that what libraries leave behind does not add up
_context = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Outcome:
    """What came out of a case."""

    kind: str
    detail: str = ""

    @property
    def bad(self) -> bool:
        """Whether something came out that must not."""
        return self.kind.isupper() or self.kind.split()[0].isupper()


class Worker:
    """Runs cases of one target in a process of its own, which is started again where a case ends it."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._folder = Path(tempfile.mkdtemp(prefix="tiue-fuzz-", dir=_shared_memory()))
        self._process: Any = None
        self._cases = 0
        self.seconds = 0.0  # of the last case

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, case: Case) -> Outcome:
        """Run a case, for at most DEADLINE seconds."""
        if self._process is None:
            self._start()
        self._cases += 1
        begun = time.monotonic()
        try:
            self._connection.send((case.files, case.about))
            if not self._connection.poll(DEADLINE):
                self._stop()
                return Outcome("HUNG", f"no answer after {DEADLINE:.0f} s")
            outcome = Outcome(*self._connection.recv())
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self._stop()
            said = (self._folder / "stderr").read_text(errors="replace")[-300:]
            return Outcome(f"CRASHED {signal.Signals(-code).name if code < 0 else code}", said)
        self.seconds = time.monotonic() - begun
        # Where a case was cancelled, its work may go on.
        if self._cases >= _CASES or "Cancelled" in outcome.kind:
            self._stop()
        return outcome

    def _start(self) -> None:
        self._connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, self.target, self._folder), daemon=True)
        self._process.start()
        theirs.close()
        self._cases = 0
        if not self._connection.poll(FIRST_DEADLINE):
            self._stop()
            raise RuntimeError(f"a worker did not start within {FIRST_DEADLINE:.0f} s")
        self._connection.recv()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _shared_memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _serve(connection: Connection, target: str, folder: Path) -> None:
    """Run cases until the pipe is closed. The first one, which says that all is loaded, is not damaged."""
    from fuzz import targets
    from fuzz.driver import undamaged

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    errors = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    sys.stdout = sys.stderr
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    case = undamaged(target)
    answer = targets.run(target, case.files, case.about, folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    connection.send(answer)
    with contextlib.suppress(EOFError):
        while True:
            files, about = connection.recv()
            os.ftruncate(errors, 0)
            connection.send(targets.run(target, files, about, folder))
