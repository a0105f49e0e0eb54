import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle, write_bundle
from tiue_runtime.errors import BundleError, DeviceError, InferenceError
from tiue_runtime.host import machine
from tiue_runtime.host.machine import thread_count
from tiue_runtime.ort import sessions
from tiue_runtime.ort.devices import INSTALLS, Device
from tiue_runtime.ort.graph import Graph
from tiue_runtime.ort.placement import place

no_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in sessions.available_providers(), reason="ONNX Runtime with CUDA is installed"
)


def test_cpu():
    assert place("cpu").device == Device("cpu")
    assert str(Device("cuda", 1)) == "cuda:1" and str(Device("cuda")) == "cuda"


@no_cuda
def test_cuda_is_refused_on_a_cpu_wheel(tiny):
    for device in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=r"has only .*CPUExecutionProvider.*pip install .*onnxruntime-gpu"):
            Pipeline.load(tiny, device=device)


@no_cuda
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_provider_that_is_built_in_but_does_not_start(onnxruntime_with):
    onnxruntime_with(get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"could not be started: .*nvidia-smi"):
        place("cuda")
    with pytest.warns(UserWarning, match="running on the CPU, because CUDA could not be started"):
        assert place("auto").device == Device("cpu")


@no_cuda
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_session_that_fell_back_is_refused(tiny):
    with pytest.raises(DeviceError, match=r"asked for cuda \(CUDAExecutionProvider\).*got CPUExecutionProvider"):
        Graph(tiny / "vae_decoder.onnx", Device("cuda"))


def test_two_wheels_are_refused(another_wheel):
    with pytest.raises(DeviceError, match=r"are installed together.*pip uninstall -y .* && pip install") as caught:
        place("cpu")
    said, _, remedy = str(caught.value).partition("pip uninstall")
    assert another_wheel in said and another_wheel in remedy


@pytest.mark.parametrize(
    "setup, message",
    [
        ("sys.modules['onnxruntime'] = None", "ONNX Runtime is not installed"),
        ("sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')", "onnxruntime is incomplete"),
    ],
)
def test_missing_onnxruntime(tiny, tmp_path, setup, message):
    code = (
        f"import sys, types; {setup}; from tiue_runtime.tools.cli import main; "
        f"sys.exit(main(['generate', 'a', '--bundle', {str(tiny)!r}, '--out', {str(tmp_path / 'a.png')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr and "pip install onnxruntime" in done.stderr


def test_corrupt_graph_is_a_bundle_error(copy):
    manifest = Bundle.load(copy).manifest
    (copy / "unet_decoder.onnx").write_bytes(b"not a graph")
    write_bundle(copy, manifest)
    with pytest.raises(BundleError, match=r"unet_decoder\.onnx: not an ONNX graph") as caught:
        Pipeline.load(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_failing_run_is_an_inference_error(tiny):
    graph = Graph(tiny / "vae_decoder.onnx", Device("cpu"))
    with pytest.raises(InferenceError, match="vae_decoder failed on cpu"):
        graph({"latents": np.zeros((1, 2), dtype=np.float32)})


def test_threads_are_those_of_the_process():
    assert 1 <= thread_count() <= (os.cpu_count() or 1)
    if shutil.which("taskset"):
        code = "from tiue_runtime.host.machine import thread_count; print(thread_count())"
        done = subprocess.run(
            ["taskset", "-c", "0", sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(
    "groups, files, threads",
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),  # rounded up
        ("0::/\n", {"cpu.max": "10000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "1600000 100000"}, 8),  # more than there are CPUs
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),  # a limit of an outer group
        ("0::/on/the/host\n", {"cpu.max": "50000 10000"}, 5),  # a container shows only its own group
        ("3:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (
            "3:cpuset:/\n",
            {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
            8,
        ),  # a limit of another group
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
    ],
)
def test_threads_within_the_quota_of_a_container(tmp_path, monkeypatch, groups, files, threads):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)))
    assert thread_count(tmp_path) == 8  # No limit is known.
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert thread_count(tmp_path) == threads


def test_what_messages_install_is_what_the_extras_install():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name: needed
        for name, needed in project["optional-dependencies"].items()
        if any(package.startswith("onnxruntime") for package in needed)
    }

    def names(text):
        return set(re.findall(r"[a-z0-9-]+(?:\[[a-z,]+\])?", re.sub(r"[<>=!][^ ]*", " ", text)))

    assert {extra: names(" ".join(needed)) for extra, needed in extras.items()} == {
        extra: names(text.replace('"', "")) for extra, text in INSTALLS.items()
    }
