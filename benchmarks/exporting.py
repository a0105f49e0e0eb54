"""What an export takes, stage by stage: `python -m benchmarks.exporting --ckpt DIR --out BUNDLE [export's flags]`.

Runs `python -m export.onnx` with the same arguments and prints its own words, then for every stage the seconds, the
most memory resident, and of that the anonymous part: the rest are pages of files, which the system can drop. Memory
is read 20 times a second from outside, on Linux.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from .machine import cpu_name

_INTERVAL = 0.05  # seconds


class _Stage:
    def __init__(self, name: str) -> None:
        self.name = name
        self.began = time.perf_counter()
        self.resident = self.anonymous = 0  # bytes, at their peaks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the export. Returns its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, "-m", "export.onnx", *arguments]
    stages = [_Stage("starting")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    watcher = threading.Thread(target=_watch, args=(process, stages))
    watcher.start()
    assert process.stderr is not None  # a pipe was asked for
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if line.endswith(" ...\n"):
            stages.append(_Stage(line.removesuffix(" ...\n")))
    status = process.wait()
    ended = time.perf_counter()
    watcher.join()
    print(f"{cpu_name()}, python -m export.onnx {' '.join(arguments)}")
    print(f"{'stage':<56} {'seconds':>8} {'GB':>6} {'anonymous GB':>13}")
    for stage, following in zip(stages, [*(s.began for s in stages[1:]), ended], strict=True):
        memory = f"{stage.resident / 1e9:>6.2f} {stage.anonymous / 1e9:>13.2f}"
        print(f"{stage.name:<56} {following - stage.began:>8.0f} {memory}")
    return status


def _watch(process: "subprocess.Popen[str]", stages: list[_Stage]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # gone between the two looks
            return
        if "RssAnon" in fields:  # absent of a process that has ended
            resident, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
            stage = stages[-1]
            stage.resident = max(stage.resident, resident)
            stage.anonymous = max(stage.anonymous, anonymous)
        time.sleep(_INTERVAL)


if __name__ == "__main__":
    sys.exit(main())
