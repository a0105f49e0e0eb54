"""The tests with the mark gpu, as a part."""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.agreement import BenchmarkError
from benchmarks.comparing import ROOT, CannotRun
from benchmarks.gpu.parts import Keep, Measure, Setting

DEVICE = "TIUE_GPU_TESTS_ON"  # the environment variable that names another device than cuda
_FOLDERS = ("tests", "runtime/tests")
_MARK = "pytest.mark.gpu"
_OUTCOMES = ("tests", "failures", "errors", "skipped")


def cases(setting: Setting) -> dict[str, Measure]:
    """Return the only case of the part tests."""
    return {"pytest": partial(_measure, setting)}


def _measure(setting: Setting, keep: Keep) -> dict[str, Any]:
    # Other files are not even imported: they need packages that a GPU's machine may lack.
    tests = [path for folder in _FOLDERS for path in sorted((ROOT / folder).glob("test_*.py"))]
    files = [path for path in tests if _MARK in path.read_text(encoding="utf-8")]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        # With other versions of libraries, a warning is not a failure.
        flags = ["-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *flags, *map(str, files)],
            cwd=ROOT,
            env=os.environ | ({DEVICE: "cpu"} if setting.dry_run else {}),
            capture_output=True,
            text=True,
        )
        if not report.exists():
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["nothing"]
            raise CannotRun(f"pytest ended with status {done.returncode}; it said: {said[-1]}")
        suite = next(ElementTree.parse(report).iter("testsuite"))
    values: dict[str, Any] = {name: int(suite.get(name, 0)) for name in _OUTCOMES}
    values |= {"reasons": _reasons(suite), "output": done.stdout[-4000:]}
    keep(values)
    if done.returncode:
        raise BenchmarkError("; ".join(values["reasons"]) or f"pytest ended with status {done.returncode}")
    return values


def _reasons(suite: ElementTree.Element) -> list[str]:
    """Return name and message of each test that failed or was skipped."""
    return [
        f"{test.get('name')}: {(outcome.get('message') or '')[:300]}"
        for test in suite.iter("testcase")
        for outcome in test
        if outcome.tag in ("failure", "error", "skipped")
    ]
