"""Programs in processes of their own, which need not import torch again, and runs that several of them share."""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed import TCPStore

PATIENCE = 300  # seconds
_CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
_CONTEXT = multiprocessing.get_context("forkserver" if _CAN_FORK else "spawn")
if _CAN_FORK:
    # One fresh process imports these. It starts when it is first needed, and each program begins as a copy of it.
    _CONTEXT.set_forkserver_preload(["tiue.distill.cli", "tiue.distill.vsd", "tiue.distill.loop", "accelerate"])


def start(program: Sequence[str], output: Path, settings: Mapping[str, str] | None = None) -> BaseProcess:
    """Start a program as `python` with these words does.

    Args:
        program: "-m" and a module, or "-c" and code, or a file; then arguments.
        output: a file for all that it prints.
        settings: environment variables beside those of this process.
    """
    process = _CONTEXT.Process(target=_run, args=(list(program), str(output), os.environ | (settings or {})))
    process.start()
    return process


def _run(program: list[str], output: str, environment: dict[str, str]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    kind, sys.argv = (program[0], program[1:]) if program[0] in ("-m", "-c") else ("", program)
    if kind == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(sys.argv[0], {"__name__": "__main__"})
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def launched(program: Sequence[str], flags: Sequence[str], processes: int) -> list[str]:
    """Start the processes of a run as `accelerate launch --cpu` does; return what each of them printed.

    The processes meet at a store of this process. It listens before they start, so no other program can take its port.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    with TemporaryDirectory() as place, ExitStack() as stack:
        outputs = [Path(place, str(rank)) for rank in range(processes)]
        started = []
        for rank, output in enumerate(outputs):
            process = start([*program, *flags], output, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            stack.callback(process.join)
            stack.callback(process.kill)
            started.append(process)
        limit, running = time.monotonic() + PATIENCE, started
        # The others wait for a process that has failed.
        while running and not any(process.exitcode for process in started) and time.monotonic() < limit:
            wait([process.sentinel for process in running], limit - time.monotonic())
            running = [process for process in started if process.exitcode is None]
        statuses = [process.exitcode for process in started]
        printed = [output.read_text() if output.exists() else "" for output in outputs]
    assert statuses == [0] * processes, "\n".join(
        f"Process {rank} {'still ran' if status is None else f'ended with status {status}'}. It printed:\n{text}"
        for rank, (status, text) in enumerate(zip(statuses, printed, strict=True))
    )
    return printed
