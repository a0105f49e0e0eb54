"""Measure an export, stage by stage: `python -m benchmarks.exporting --ckpt DIR --out BUNDLE [export's flags]`.

It runs `python -m export.onnx` with the same arguments, and prints that program's output. Then it prints the seconds of
every stage, the most memory resident, and the anonymous part of it. The rest are pages of files, which the system can
drop. Memory is read 20 times a second from outside, on Linux.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.machine import Memory, cpu_name, watching


class _Stage:
    def __init__(self, name: str) -> None:
        self.name = name
        self.began = time.perf_counter()
        self.memory = Memory()


def main(argv: Sequence[str] | None = None) -> int:
    """Run and measure the export. Returns its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, "-m", "export.onnx", *arguments]
    stages = [_Stage("starting")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None  # stderr=PIPE makes a stream.
    with ExitStack() as watched:
        watched.enter_context(watching(process.pid, stages[0].memory))
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if line.endswith(" ...\n"):
                watched.close()
                stages.append(_Stage(line.removesuffix(" ...\n")))
                watched.enter_context(watching(process.pid, stages[-1].memory))
    status = process.wait()
    ended = time.perf_counter()
    print(f"{cpu_name()}, python -m export.onnx {' '.join(arguments)}")
    print(f"{'stage':<56} {'seconds':>8} {'GB':>6} {'anonymous GB':>13}")
    for stage, following in zip(stages, [*(s.began for s in stages[1:]), ended], strict=True):
        memory = f"{stage.memory.resident / 1e9:>6.2f} {stage.memory.anonymous / 1e9:>13.2f}"
        print(f"{stage.name:<56} {following - stage.began:>8.0f} {memory}")
    return status


if __name__ == "__main__":
    sys.exit(main())
