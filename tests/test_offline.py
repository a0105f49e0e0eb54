"""No command reports its use, asks the network or leaves files in the user's directories."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
TINY_BUNDLE = ROOT / "runtime/tests/data/tiny"

# Python's own way to the network is closed. Native code is watched by strace, where that is installed.
BLOCKED = """
import runpy, socket, sys
def refuse(*_, **__):
    raise OSError("the network is blocked")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


STRACE = "strace", "-f", "--seccomp-bpf"  # The filter leaves calls that are not watched at full speed.

# urllib3 looks, when it is imported, whether this machine has IPv6: it binds a socket to the machine itself.
LOOPBACK = r'socket\(AF_INET6, SOCK_STREAM|bind\(.*inet_pton\(AF_INET6, "::1"'


@pytest.fixture
def run_offline(tmp_path):
    """run_offline(*arguments) runs a module's command, and checks that it used no network and left no file behind."""
    places = {name: tmp_path / name.lower() for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR")}

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        for place in places.values():
            place.mkdir(exist_ok=True)
        trace = tmp_path / "trace"
        watched = [*STRACE, "-e", "trace=network", "-o", trace] if _can_trace() else []
        variables = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
        variables |= {name: str(place) for name, place in places.items()}
        done = subprocess.run(
            [*watched, sys.executable, "-c", BLOCKED, *map(str, arguments)],
            cwd=ROOT,
            env=variables | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        if watched:
            calls = [line for line in trace.read_text().splitlines() if "AF_INET" in line]
            assert not [line for line in calls if not re.search(LOOPBACK, line)]
        left = [path for place in places.values() for path in place.rglob("*")]
        assert not left, left
        return done

    return run


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return tiny.save_pipeline(tiny.small(), tmp_path_factory.mktemp("pipeline"))


def _can_trace() -> bool:
    """Say whether strace is installed and may trace: containers often forbid it."""
    return bool(shutil.which("strace")) and subprocess.run([*STRACE, "-o", os.devnull, "true"]).returncode == 0


def test_drawing_a_picture_is_offline(run_offline, tmp_path):
    out = tmp_path / "picture.png"
    done = run_offline("tiue_runtime", "generate", "a red heart", "--bundle", TINY_BUNDLE, "--out", out)
    assert out.is_file()
    assert not done.stderr


def test_a_home_that_cannot_be_written_causes_no_foreign_warning(run_offline, tmp_path):
    done = run_offline(
        "tiue_runtime", "generate", "a red heart", "--bundle", TINY_BUNDLE, "--out", tmp_path / "picture.png",
        HOME="/proc/none", XDG_CACHE_HOME="/proc/none",
    )  # fmt: skip
    assert not done.stderr


def test_doctor_says_that_nothing_is_reported(run_offline):
    assert re.search(r"^telemetry +off", run_offline("tiue_runtime", "doctor").stdout, re.MULTILINE)


def test_exporting_is_offline(run_offline, pipeline, tmp_path):
    run_offline("export.onnx", "--ckpt", pipeline, "--steps", "1", "--out", tmp_path / "bundle")


def test_distilling_is_offline(run_offline, pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red heart\na blue star\n")
    run_offline(
        "tiue", "--preset", "tiny", "--teacher", pipeline, "--prompts", prompts, "--out", tmp_path / "run",
        "--iterations", "1",
    )  # fmt: skip
    assert (tmp_path / "run/report.md").is_file()


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("", "1"), ("0", "0"), ("1", "1")])
@pytest.mark.parametrize("package", ["tiue_runtime", "tiue", "benchmarks"])
def test_telemetry_is_off_unless_the_user_turned_it_on(package, given, kept):
    variables = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    variables |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    code = f"import os, {package}; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == kept


def test_kernels_of_the_hub_are_never_loaded(tmp_path):
    (tmp_path / "kernels.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "import tiue.checkpoint, export.source"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr


def test_a_program_that_uses_kernels_of_the_hub_keeps_them():
    code = "import sys, types; own = sys.modules['kernels'] = types.ModuleType('kernels'); import tiue; import kernels"
    subprocess.run([sys.executable, "-c", f"{code}; assert kernels is own"], cwd=ROOT, check=True)
