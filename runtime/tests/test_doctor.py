import ctypes
from types import SimpleNamespace

import onnxruntime
import pytest
from tiue_runtime.host import gpu
from tiue_runtime.host.gpu import Gpu
from tiue_runtime.ort import placement, sessions
from tiue_runtime.ort.devices import Device
from tiue_runtime.tools import doctor

GIB = 2**30


class Driver:
    """libcuda and libnvidia-ml of a machine with `gpus`; every function returns 0 for success, or an error."""

    def __init__(self, gpus=(), failed=0):
        self.gpus, self.failed = gpus, failed

    def load(self, name):
        assert name in ("libcuda.so.1", "libnvidia-ml.so.1", "nvcuda.dll", "nvml.dll")
        return self

    def cuInit(self, flags):
        assert flags == 0
        return self.failed

    def cuDriverGetVersion(self, number):
        number._obj.value = 13000
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = 10 + index
        return 0

    def cuDeviceGetName(self, text, size, device):
        assert size == ctypes.sizeof(text)
        text.value = self.gpus[device.value - 10].name.encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):
        memory._obj.value = self.gpus[device.value - 10].memory
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.gpus[device.value - 10].capability[{75: 0, 76: 1}[attribute]]
        return 0

    def nvmlInit_v2(self):
        return 0

    def nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"580.65.06"
        return 0

    def nvmlShutdown(self):
        return 0


def missing(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_gpus():
    gpus = [Gpu("NVIDIA GeForce RTX 4090", 24 * GIB, (8, 9)), Gpu("NVIDIA GeForce RTX 5090", 32 * GIB, (12, 0))]
    assert gpu.find_gpus(Driver(gpus).load) == gpus
    assert gpu.driver_version(Driver(gpus).load) == "580.65.06, CUDA 13.0"


@pytest.mark.parametrize(
    "load, why",
    [
        (missing, "there is no NVIDIA driver"),
        (Driver().load, "the NVIDIA driver finds no GPU"),
        (Driver(failed=100).load, "the NVIDIA driver finds no GPU"),
        (Driver(failed=804).load, "the NVIDIA driver does not start (CUDA error 804)"),
    ],
)
def test_no_gpus(load, why):
    assert str(gpu.find_gpus(load)).startswith(why)


def test_a_driver_that_says_nothing():
    assert gpu.driver_version(missing) == ""
    assert gpu.driver_version(lambda name: SimpleNamespace()) == ""


def test_the_gpu_and_its_wheels(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: [Gpu("RTX", 24 * GIB, (8, 9))])
    monkeypatch.setattr(doctor, "driver_version", lambda: "580, CUDA 13.0")
    wheels = [
        SimpleNamespace(name=name, version="9.1") for name in ("nvidia-cudnn-cu13", "numpy", "tensorrt-cu13-libs")
    ]
    monkeypatch.setattr(doctor, "distributions", lambda: wheels)
    rows, _ = doctor.examine()
    assert rows["gpu 0"] == "RTX, 24.0 GiB, compute capability 8.9"
    assert rows["gpu driver"] == "580, CUDA 13.0"
    assert rows["gpu wheels"] == "nvidia-cudnn-cu13 9.1, tensorrt-cu13-libs 9.1"


def test_a_machine_without_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: "there is no NVIDIA driver")
    rows, _ = doctor.examine()
    assert rows["gpu"] == "none found: there is no NVIDIA driver"
    assert not {"gpu driver", "gpu wheels"} & set(rows)


def test_every_provider_is_tried(monkeypatch):
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider", "AzureExecutionProvider"]
    monkeypatch.setattr(doctor, "available_providers", lambda: providers)
    monkeypatch.setattr(doctor, "probe", lambda device: "" if device.kind == "cpu" else "no driver")

    def preload(ort, device):
        print("Failed to load libcublas.so.13")

    monkeypatch.setattr(doctor, "preload_libraries", preload)
    monkeypatch.setattr(doctor, "_loaded_libraries", lambda: ["libcudart.so.13"])
    rows, problems = doctor.examine()
    assert rows["provider cpu"] == "yes: CPUExecutionProvider starts"
    assert rows["provider cuda"] == "no: CUDAExecutionProvider does not start: no driver"
    tensorrt = "no: TensorrtExecutionProvider is not installed; tiue-runtime[tensorrt] brings it"
    assert rows["provider tensorrt"] == tensorrt
    assert rows["preloaded"] == "libcudart.so.13; Failed to load libcublas.so.13"
    assert rows["other providers"] == "AzureExecutionProvider (built in, not used)"
    assert problems == []


def test_two_wheels_are_a_problem_and_no_crash(monkeypatch, tiny):
    monkeypatch.setattr(sessions, "installed_wheels", lambda: {"onnxruntime": "1.30", "onnxruntime-gpu": "1.30"})
    _, problems = doctor.examine(tiny, "cpu")
    assert len(problems) == 1  # said once, though two parts of the examination meet it
    assert "are installed together" in problems[0] and "pip uninstall -y onnxruntime onnxruntime-gpu" in problems[0]


@pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"), reason="ONNX Runtime is too old"
)
def test_nodes_are_counted(tiny):
    rows, problems = doctor.examine(tiny, "cpu")
    assert rows["placement of"] == "tiny, portable graphs, on cpu" and problems == []
    nodes = {name.removeprefix("nodes of "): text for name, text in rows.items() if name.startswith("nodes of ")}
    assert set(nodes) >= {"text_encoder", "unet_encoder", "unet_decoder", "vae_decoder"}
    for text in nodes.values():
        provider, count = text.split()
        assert provider == "CPUExecutionProvider" and int(count) > 0


def test_nodes_that_a_gpu_leaves_to_the_cpu():
    def part(provider, *kinds):
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=kind) for kind in kinds])

    cuda, cpu = Device("cuda").provider, Device("cpu").provider
    parts = [part(cpu, "Shape"), part(cuda, "Conv", "Add"), part(cpu, "Gather", "Shape"), part(cuda, "Conv")]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    expected = "CUDAExecutionProvider 3, CPUExecutionProvider 3 (2 Shape, 1 Gather)"
    assert doctor._placement(session, Device("cuda")) == expected
    older = SimpleNamespace()
    assert doctor._placement(older, Device("cuda")) == "not reported by this version of ONNX Runtime"


def test_the_device_is_chosen_for_the_bundle(monkeypatch, edit):
    def only_cpu(content):
        content["variants"] = {"cpu": content["variants"]["portable"]}

    monkeypatch.setattr(sessions, "available_providers", lambda: [Device("openvino").provider, Device("cpu").provider])
    monkeypatch.setattr(placement, "probe", lambda device: "")
    rows, problems = doctor.examine(edit(only_cpu))
    assert problems == [] and rows["device auto"] == Device("cpu")
    assert rows["placement of"] == "tiny, cpu graphs, on cpu"


def test_problems_of_a_placement(tiny, copy):
    (copy / "bundle.json").write_text("{}")
    _, problems = doctor.examine(copy)
    assert "bundle.json" in problems[-1]
    _, problems = doctor.examine(tiny, "gpu")
    assert problems[-1].startswith("device: expected")


def test_why_a_provider_does_not_start(monkeypatch, tmp_path):
    module = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sessions.sys.modules, "onnxruntime", module)
    (tmp_path / "capi").mkdir()
    for name in ("libonnxruntime_providers_cuda.so", "onnxruntime_providers_cuda.dll"):
        (tmp_path / "capi" / name).touch()
    monkeypatch.setattr(placement, "find_gpus", lambda: "there is no NVIDIA driver")
    monkeypatch.setattr(placement.ctypes, "CDLL", missing)
    why = placement._with_reason("gave CPU", Device("cuda"))
    assert why.startswith("gave CPU (there is no NVIDIA driver; ") and "cannot open shared object file" in why
    monkeypatch.setattr(placement, "find_gpus", lambda: [Gpu("RTX", GIB, (8, 9))])
    monkeypatch.setattr(placement.ctypes, "CDLL", lambda name: None)
    assert placement._with_reason("gave CPU", Device("cuda")) == "gave CPU"
    assert placement._with_reason("gave CPU", Device("cpu")) == "gave CPU"
