"""The machine of a measurement, and the memory of processes."""

import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GPUS = ("cuda", "tensorrt")  # beginnings of the names of devices that are GPUs
_INTERVAL = 0.05  # seconds between two readings of another process's memory


@dataclass
class Memory:
    """Peaks in bytes. Memory that is not anonymous consists of pages of files, which the system can drop."""

    resident: int = 0
    anonymous: int = 0

    def note(self, pid: int) -> None:
        """Raise the peaks to the present memory of a process. Without /proc, or after its end, do nothing."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        fields = dict(line.split(":", 1) for line in lines)
        if "RssAnon" in fields:  # A process that has ended has no such line.
            resident, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
            self.resident = max(self.resident, resident)
            self.anonymous = max(self.anonymous, anonymous)


@contextmanager
def watching(pid: int, memory: Memory) -> Iterator[None]:
    """Note the memory of a process 20 times a second, from outside, on Linux."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL):
            memory.note(pid)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        memory.note(pid)


def peak_bytes() -> int:
    """Return the most memory that this process has had resident: VmHWM, or getrusage's value without /proc."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # This module exists on Unix only.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_query(field: str) -> str:
    """Return a field of the first GPU, named as in nvidia-smi's --query-gpu. Raises OSError without nvidia-smi."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def gpu_used_bytes() -> int:
    """Return the memory in use on the first GPU, by all processes."""
    return int(gpu_query("memory.used")) * 2**20
