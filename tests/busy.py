"""Waiting until a program has worked for a while, however busy the machine is."""

import os
import subprocess
import sys
import time
from pathlib import Path


def wait_until_busy(process: "subprocess.Popen[str]", seconds: float) -> None:
    """Wait until a running program has used so many seconds of processor time, or has ended."""
    if sys.platform != "linux":
        time.sleep(seconds)
        return
    while process.poll() is None and _used(process.pid) < seconds:
        time.sleep(0.02)


def _used(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in the program and in the kernel
