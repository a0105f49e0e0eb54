"""One part: `python -m benchmarks.gpu.one_part NAME OUT WORK SECONDS`, the process that benchmarks.gpu starts."""

import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.agreement import BenchmarkError
from benchmarks.comparing import CannotRun
from benchmarks.gpu.conditions import conditions
from benchmarks.gpu.parts import PARTS, Measure, Setting
from benchmarks.gpu.results import Case, Result, resumed
from benchmarks.latency import progress


def run_part(name: str, setting: Setting, out: Path) -> Result:
    """Measure the cases of a part that are not done. Everything is on the disk as soon as it is known.

    Args:
        name: a key of PARTS.
        setting: of all parts.
        out: directory of the results.

    Returns:
        The result, which is also in the directory. Errors of cases are in it.

    Raises:
        BenchmarkError, OSError: an earlier result cannot be read, or this one cannot be written.
    """
    part = PARTS[name]
    result = resumed(out, Result(name, part.about, setting.gpu))
    if result.status == "done":
        return result
    try:
        cases = part.cases(setting)
    except Exception as error:  # A part that fails must leave the others.
        result.status, result.reason = _judged(error)
        result.write(out)
        return result
    now = conditions(setting.dry_run)
    for case, measure in cases.items():
        if case in result.cases and result.cases[case].status == "done":
            continue
        if setting.seconds_left <= 0:
            break
        progress(f"{name}: {case}")
        _measure(result, case, measure, now, out)
    result.finish(cases)
    result.write(out)
    return result


def _measure(result: Result, name: str, measure: Measure, now: dict[str, Any], out: Path) -> None:
    started = time.monotonic()

    def record(status: str, reason: str, values: dict[str, Any]) -> None:
        result.cases[name] = Case(status, reason, round(time.monotonic() - started, 2), values, now)
        result.write(out)

    try:
        record("done", "", measure(lambda values: record("partial", "", values)))
    except Exception as error:  # A case that fails must leave the others.
        kept = result.cases[name].values if name in result.cases else {}
        record(*_judged(error), kept)


def _judged(error: Exception) -> tuple[str, str]:
    """Return status and reason of a part or a case that raised an error."""
    said = " ".join(str(error).split())[:500]
    if isinstance(error, ModuleNotFoundError):
        return "cannot run", f"the package {error.name} is not installed"
    if isinstance(error, CannotRun):
        return "cannot run", said
    traceback.print_exception(error)
    return "failed", f"{type(error).__name__}: {said}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part on a GPU. Returns 0 if its result says what happened, otherwise 1 after one line on stderr."""
    name, out, work, seconds = sys.argv[1:] if argv is None else argv
    try:
        run_part(name, Setting(False, Path(work), float(seconds)), Path(out))
    except (BenchmarkError, CannotRun, OSError) as error:
        print(f"benchmarks.gpu: error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
