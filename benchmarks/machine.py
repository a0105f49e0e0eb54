"""The machine of a measurement, and the memory of processes."""

import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GPUS = ("cuda", "tensorrt")  # prefixes of the names of GPU devices
_INTERVAL = 0.05  # seconds between two readings of another process's memory


@dataclass
class Memory:
    """Peaks in bytes. Resident memory that is not anonymous consists of pages of files, which the system can drop."""

    resident: int = 0
    anonymous: int = 0

    def note(self, pid: int) -> None:
        """Raise the peaks to a process's current memory. Does nothing without /proc, or after the process has ended."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        fields = dict(line.split(":", 1) for line in lines)
        if "RssAnon" in fields:  # It is absent if the process has ended.
            resident, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
            self.resident = max(self.resident, resident)
            self.anonymous = max(self.anonymous, anonymous)


@contextmanager
def watching(pid: int, memory: Memory) -> Iterator[None]:
    """Record a process's memory 20 times a second, from outside, on Linux."""
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
    """Return the peak of this process's resident memory: VmHWM, or getrusage's value if there is no /proc."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # It exists on Unix only.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_query(field: str) -> str:
    """Return one of nvidia-smi's --query-gpu fields, of the first GPU. Raises OSError without nvidia-smi."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def gpu_used_bytes() -> int:
    """Return the used memory of the first GPU, in bytes, of all processes."""
    return int(gpu_query("memory.used")) * 2**20
