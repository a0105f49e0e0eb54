"""`python -m benchmarks.gpu`: what only a GPU can show, within a time limit. Called again, it goes on.

Parts run in the order of their value per second, each in a process of its own. Each case of a part is written to the
disk as soon as it is measured. Another call measures only what is not done. A part that cannot run says why.

--dry-run measures tiny models on the CPU in this process. It shows that every part works. Its figures mean nothing.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.agreement import BenchmarkError
from benchmarks.comparing import CannotRun
from benchmarks.gpu.one_part import run_part
from benchmarks.gpu.parts import PARTS, Setting
from benchmarks.gpu.results import SUMMARY, Result, resumed
from benchmarks.gpu.supervised import run_for


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 if a part failed; 2 after one line on stderr if there is no GPU or a file cannot be read or written.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (BenchmarkError, CannotRun, OSError) as error:
        remedy = "; --dry-run tries every part on the CPU" if isinstance(error, CannotRun) else ""
        print(f"benchmarks.gpu: error: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    dry_run, work = arguments.dry_run, arguments.work.absolute()
    out = (arguments.out or Path("runs/gpu-dry" if dry_run else "runs/gpu")).absolute()
    until = time.monotonic() + arguments.seconds
    gpu = Setting(dry_run, work, arguments.seconds).gpu
    failed = False
    for name in (part for part in PARTS if part in arguments.parts):
        begun, left = time.monotonic(), until - time.monotonic()
        result = resumed(out, Result(name, PARTS[name].about, gpu))
        if result.status == "done":
            print(f"{name}: done before", flush=True)
            continue
        if left < (0 if dry_run else PARTS[name].needs_seconds):
            result.status, result.reason = "unfinished", f"{left:.0f} s were left, which is too little for this part"
            result.write(out)
        elif dry_run:
            result = run_part(name, Setting(True, work, left), out)
        else:
            command = [sys.executable, "-m", "benchmarks.gpu.one_part", name, str(out), str(work), str(left)]
            result = _after(run_for(command, left), result, out)
        failed |= result.status == "failed"
        reason = f" ({result.reason})" if result.reason else ""
        print(f"{name}: {result.status} after {time.monotonic() - begun:.0f} s{reason}", flush=True)
    print(f"wrote {out / SUMMARY}")
    return int(failed)


def _after(ended: str, fresh: Result, out: Path) -> Result:
    """Return the result of a part's process. If the process did not end by itself, note this.

    Args:
        ended: why the process did not end well, or "".
        fresh: the result from before the process.
        out: directory of the results.
    """
    result = resumed(out, fresh)
    if ended:
        result.status = "unfinished" if ended.startswith("stopped") else "failed"
        result.reason = ended
        result.write(out)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measure what only a GPU can show, within a time limit. Called again, it goes on.",
        epilog="parts, in their order: " + "; ".join(f"{name}: {part.about}" for name, part in PARTS.items()),
    )
    parser.add_argument(
        "--parts", type=_names, default=tuple(PARTS), metavar="A,B", help=f"of {','.join(PARTS)} (default: all)"
    )
    parser.add_argument("--seconds", type=_positive, default=1500, help="time limit of the whole (default: 1500)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results, at most 7 files (default: runs/gpu, or runs/gpu-dry)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks"), help="pipelines and bundles, which are made once"
    )
    parser.add_argument("--dry-run", action="store_true", help="try every part with tiny models on the CPU")
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, got {','.join(unknown)!r}")
    return names


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return seconds


if __name__ == "__main__":
    # Whoever ends this process also ends the part that it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
