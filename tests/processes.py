"""Runs of several processes, without accelerate's launcher."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed import TCPStore

PATIENCE = 300  # seconds


def launched(program: list[str], flags: list[str], processes: int) -> list[str]:
    """Start the processes of a run as `accelerate launch --cpu` does; return what each of them printed.

    The processes meet at a store of this process. It listens before they start, so no other program can take its port.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    settings = os.environ | meeting | {"WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *program, *flags]
    with TemporaryDirectory() as place, ExitStack() as stack:
        started, outputs = [], [Path(place, str(rank)) for rank in range(processes)]
        for rank, path in enumerate(outputs):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                command, env=settings | of_rank, stdout=stack.enter_context(path.open("w")), stderr=subprocess.STDOUT
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        limit = time.monotonic() + PATIENCE
        # The others wait for a process that has failed.
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            if time.monotonic() > limit:
                break
            time.sleep(0.02)
        statuses = [process.poll() for process in started]
        printed = [path.read_text() for path in outputs]
    assert statuses == [0] * processes, "\n".join(
        f"Process {rank} {'still ran' if status is None else f'ended with status {status}'}. It printed:\n{text}"
        for rank, (status, text) in enumerate(zip(statuses, printed, strict=True))
    )
    return printed
