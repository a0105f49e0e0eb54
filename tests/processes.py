"""Runs of several processes, without accelerate's launcher."""

import os
import socket
import subprocess
import sys


def launched(program: list[str], flags: list[str], processes: int) -> list[str]:
    """Start the processes of a run as `accelerate launch --cpu` does; return what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    address |= {"WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, *program, *flags],
            env=os.environ | address | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in map(str, range(processes))
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(outputs)
    return outputs
