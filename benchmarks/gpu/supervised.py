"""Processes with a time limit. When it ends, their own children end with them."""

import os
import signal
import subprocess
from collections.abc import Sequence

from benchmarks.comparing import ROOT


def run_for(command: Sequence[str], seconds: float) -> str:
    """Run a command in the root of the repository for at most some seconds.

    Args:
        command: the words. Its output goes to this process's.
        seconds: the time limit.

    Returns:
        Why it did not end well, or "".
    """
    process = subprocess.Popen(command, cwd=ROOT, process_group=0)
    try:
        status = process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s: the time was over"
    finally:
        _end(process)
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"ended with status {status}" if status else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # All of them have ended.
    finally:
        process.wait()
