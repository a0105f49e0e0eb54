"""The benchmark for GPUs: its dry run on the CPU, and what happens to parts that fail, stop or cannot run."""

import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.comparing import CannotRun
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import conditions, one_part, parts, results, supervised
from benchmarks.gpu.parts import PARTS, Part, Setting

# Fields that every case of a part promises.
TIMES = {"update_ms", "least_ms", "most_ms", "updates_per_s", "samples_per_s"}
FIELDS = {
    "network": {"batch", "full_ms", "encoder_ms", "decoder_ms", "student_ms", "decoder_by_full", "student_by_full"},
    "launches": {"large", "one_ms", "large_ms", "large_by_one"},
    "training": {"batch_size", "estimated_gb", *TIMES},
    "tests": {"tests", "failures", "errors", "skipped", "reasons"},
    "cuda": {"model", "about", "contenders", "left_out", "table"},
    "tensorrt": {"model", "about", "contenders", "left_out", "table"},
}


@pytest.fixture
def own_parts(monkeypatch):
    """Replace the parts by functions of a test, and tell what they measured."""
    calls = []

    def replace(**functions):
        PARTS_NOW = {name: Part(f"about {name}", 0, f"{__name__}:{name}") for name in functions}
        for module in (gpu, one_part, results):
            monkeypatch.setattr(module, "PARTS", PARTS_NOW)
        monkeypatch.setattr(parts.pkgutil, "resolve_name", lambda name: functions[name.partition(":")[2]])
        return calls

    return replace


def read(out, part):
    return json.loads((out / f"{part}.json").read_text(encoding="utf-8"))


def counted(calls, name, values=None, error=None):
    """A case that writes down that it was measured."""

    def measure(keep):
        calls.append(name)
        keep({"begun": 1})
        if error:
            raise error
        return values or {"ms": 2.0}

    return measure


def test_the_dry_run_tries_every_part_and_is_not_repeated(tmp_path, capsys):
    flags = ["--dry-run", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert gpu.main(flags) == 0, capsys.readouterr().out
    for part, fields in FIELDS.items():
        result = read(tmp_path / "out", part)
        assert (result["schema"], result["part"], result["gpu"]) == ("tiue-gpu/1", part, "")
        assert (result["status"], result["reason"]) == ("done", "") and result["about"] == PARTS[part].about
        assert result["cases"]
        for case in result["cases"].values():
            assert case["status"] == "done" and case["seconds"] > 0 and fields <= case["values"].keys(), part
            assert case["conditions"]["cpu"] and case["conditions"]["versions"]["torch"]
            assert all(v > 0 for name, v in case["values"].items() if name.endswith(("_ms", "_s", "_gb")))
    tests = read(tmp_path / "out", "tests")["cases"]["pytest"]["values"]
    assert tests["tests"] > 0 and tests["skipped"] == 0
    [picture] = read(tmp_path / "out", "cuda")["cases"]["ONNX Runtime"]["values"]["contenders"].values()
    assert picture["seconds"]["1"][0] > 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(written) <= 8 and max(map(len, written.values())) < 2**20
    summary = written["summary.md"].decode()
    assert all(f"## {part}\n" in summary for part in PARTS) and "Its figures mean nothing" in summary
    assert "| batch 1, eager | done | 1 |" in summary and "| tiue:bundle=shipped | 1 " in summary
    capsys.readouterr()

    started = time.perf_counter()
    assert gpu.main(flags) == 0
    assert time.perf_counter() - started < 1
    assert capsys.readouterr().out.count(": done before") == len(PARTS)
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_failure_leaves_the_others_and_alone_is_repeated(tmp_path, own_parts, capsys):
    calls = []
    broken = {"error": RuntimeError("a kernel\nfailed")}
    cases = lambda _: {"a": counted(calls, "a"), "b": counted(calls, "b", **broken), "c": counted(calls, "c")}  # noqa: E731

    def nothing(_):
        raise ModuleNotFoundError("No module named 'x'", name="x")

    def absent(_):
        raise CannotRun("expected CUDAExecutionProvider")

    own_parts(first=cases, second=nothing, third=absent, fourth=lambda _: {"d": counted(calls, "d")})
    flags = ["--dry-run", "--out", str(tmp_path)]
    assert gpu.main(flags) == 1
    assert calls == ["a", "b", "c", "d"]
    first = read(tmp_path, "first")
    assert (first["status"], first["reason"]) == ("failed", "b: RuntimeError: a kernel failed")
    assert first["cases"]["b"]["values"] == {"begun": 1}
    assert {name: case["status"] for name, case in first["cases"].items()} == {"a": "done", "b": "failed", "c": "done"}
    found = [(read(tmp_path, name)["status"], read(tmp_path, name)["reason"]) for name in ("second", "third", "fourth")]
    assert found[0] == ("cannot run", "the package x is not installed")
    assert found[1:] == [("cannot run", "expected CUDAExecutionProvider"), ("done", "")]
    printed = capsys.readouterr().out
    assert "third: cannot run after 0 s (expected CUDAExecutionProvider)" in printed and "fourth: done" in printed

    broken["error"] = None
    own_parts(first=cases, fourth=lambda _: {"d": counted(calls, "d")})
    calls.clear()
    cases = lambda _: {"a": counted(calls, "a"), "b": counted(calls, "b"), "c": counted(calls, "c")}  # noqa: E731
    own_parts(first=cases, fourth=lambda _: {"d": counted(calls, "d")})
    assert gpu.main(flags) == 0
    assert calls == ["b"] and read(tmp_path, "first")["status"] == "done"


def test_time_that_is_over_ends_a_part_between_cases_and_within(tmp_path, own_parts):
    calls = []

    setting = Setting(True, tmp_path, 2)

    def late(keep):
        calls.append("late")
        while setting.seconds_left > 0:
            time.sleep(0.01)
        return {}

    own_parts(only=lambda _: {"late": late, "later": counted(calls, "later")})
    result = one_part.run_part("only", setting, tmp_path)
    assert calls == ["late"]
    assert (result.status, result.reason) == ("unfinished", "not measured yet: later")
    assert one_part.run_part("only", Setting(True, tmp_path, 10), tmp_path).status == "done"
    assert calls == ["late", "later"]

    begun = time.perf_counter()
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert supervised.run_for([sys.executable, "-c", sleeper], 0.5) == "stopped after 0 s: the time was over"
    assert time.perf_counter() - begun < 20
    killed = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    assert supervised.run_for([sys.executable, "-c", killed], 60) == "killed by SIGKILL"
    assert supervised.run_for([sys.executable, "-c", "raise SystemExit(3)"], 60) == "ended with status 3"
    assert supervised.run_for([sys.executable, "-c", ""], 60) == ""


def test_parts_run_as_processes_on_a_gpu(tmp_path, monkeypatch, own_parts):
    """The command of a part, its limit, and what a process leaves behind that did not end by itself."""
    own_parts(first=None, second=None, third=None)
    monkeypatch.setattr(parts, "gpu_field", lambda field: "H200")
    commands = []

    def run_for(command, seconds):
        commands.append((command[1:4], seconds))
        if command[3] == "first":
            results.Result("first", "about first", "H200", cases={"a": results.Case("partial")}).write(tmp_path)
            return "stopped after 9 s: the time was over"
        return "killed by SIGSEGV" if command[3] == "second" else ""

    monkeypatch.setattr(gpu, "run_for", run_for)
    assert gpu.main(["--out", str(tmp_path), "--seconds", "9", "--parts", "first,second"]) == 1
    assert [command for command, _ in commands] == [["-m", "benchmarks.gpu.one_part", n] for n in ("first", "second")]
    assert all(8 < seconds <= 9 for _, seconds in commands)
    first, second = read(tmp_path, "first"), read(tmp_path, "second")
    assert first["status"] == "unfinished" and first["reason"].startswith("stopped") and first["cases"]
    assert (second["status"], second["reason"]) == ("failed", "killed by SIGSEGV")

    monkeypatch.setitem(gpu.PARTS, "third", Part("about third", 30, ""))
    assert gpu.main(["--out", str(tmp_path), "--seconds", "9", "--parts", "third"]) == 0
    assert "which is too little for this part" in read(tmp_path, "third")["reason"]


def test_results_of_another_gpu_are_neither_continued_nor_overwritten(tmp_path, monkeypatch, capsys):
    results.Result("network", "", "H200", "done").write(tmp_path)
    written = (tmp_path / "network.json").read_bytes()
    assert results.resumed(tmp_path, results.Result("network", "", "H200")).status == "done"
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--parts", "network"]) == 2
    assert "network.json holds the results of H200: name another --out" in capsys.readouterr().err
    monkeypatch.setattr(parts, "gpu_field", lambda field: "L4")
    assert gpu.main(["--out", str(tmp_path), "--parts", "network"]) == 2
    assert (tmp_path / "network.json").read_bytes() == written


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    def no_driver(field):
        raise FileNotFoundError("no nvidia-smi")

    monkeypatch.setattr(conditions, "gpu_query", no_driver)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "benchmarks.gpu: error: no GPU: nvidia-smi: no nvidia-smi; --dry-run tries every part on the CPU\n"
    )
    for content in ("[]", "{", '{"schema": "other"}', '{"schema": "tiue-gpu/1", "cases": {"a": {"unknown": 1}}}'):
        (tmp_path / "network.json").write_text(content)
        assert gpu.main(["--dry-run", "--out", str(tmp_path), "--parts", "network"]) == 2
        assert "network.json is no result of this benchmark" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "file"), "--parts", "network"]) == 2
    for flags, said in (
        (["--parts", "network,x"], "expected some of network,launches,training,tests,cuda,tensorrt, got 'x'"),
        (["--seconds", "0"], "expected seconds above 0, got '0'"),
        (["--seconds", "nan"], "expected seconds above 0, got 'nan'"),
    ):
        with pytest.raises(SystemExit) as error:
            gpu.main(flags)
        assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_provider_that_is_missing_is_named():
    with pytest.raises(CannotRun, match=r"expected NoProvider, the installed ONNX Runtime [\d.]+ has .*CPU"):
        conditions.check_provider("NoProvider")


def test_a_part_of_its_own_process_says_that_there_is_no_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.one_part", "network", str(tmp_path), str(tmp_path), "60"]
    done = subprocess.run(command, cwd=supervised.ROOT, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("benchmarks.gpu: error: network: no GPU: nvidia-smi")
