"""What a measurement was made on, and how much memory it took."""

import platform
import subprocess
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The most memory this process has had resident: VmHWM, or what getrusage says where there is no /proc."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_query(field: str) -> str:
    """One of nvidia-smi's --query-gpu fields, of the first GPU. Raises OSError without nvidia-smi."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def gpu_used_bytes() -> int:
    """Memory in use on the first GPU, by everyone."""
    return int(gpu_query("memory.used")) * 2**20
