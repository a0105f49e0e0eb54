import ctypes
import mmap
import os
import warnings
from types import SimpleNamespace

import onnxruntime
import pytest
from tiue_runtime.host import gpu
from tiue_runtime.host.gpu import Gpu
from tiue_runtime.ort import placement
from tiue_runtime.ort.devices import Device
from tiue_runtime.tools import doctor

GIB = 2**30


class Driver:
    """Fakes libcuda and libnvidia-ml of a machine with `gpus`. Functions return 0 for success, or an error code."""

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
    names = "nvidia-cudnn-cu13", "numpy", None, "tensorrt-cu13-libs"  # None: pip removed a part of it only
    wheels = [SimpleNamespace(name=name, version="9.1") for name in names]
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


def test_every_provider_is_tried(onnxruntime_with):
    def without_driver(*arguments, providers, **options):
        if providers[0][0] == "CUDAExecutionProvider":
            raise RuntimeError("no driver")
        return onnxruntime.InferenceSession(*arguments, providers=providers, **options)

    onnxruntime_with(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider", "AzureExecutionProvider"],
        InferenceSession=without_driver,
        preload_dlls=lambda: print("Failed to load libcublas.so.13"),
    )
    with pytest.warns(UserWarning, match="CUDA could not be started: no driver"):
        rows, problems = doctor.examine()
    assert rows["provider cpu"] == "yes: CPUExecutionProvider starts"
    assert str(rows["provider cuda"]).startswith("no: device: 'cuda' could not be started: no driver")
    tensorrt = str(rows["provider tensorrt"])
    assert tensorrt.startswith("no: TensorrtExecutionProvider is not installed") and "tensorrt-cu13-libs" in tensorrt
    assert "Failed to load libcublas.so.13" in str(rows["preloaded"])
    assert rows["other providers"] == "AzureExecutionProvider (built in, not used)"
    assert problems == []


def test_two_wheels_are_a_problem_and_no_crash(another_wheel, tiny):
    _, problems = doctor.examine(tiny, "cpu")
    assert len(problems) == 1  # reported once, although two parts of the examination find it
    assert "are installed together" in problems[0] and another_wheel in problems[0].partition("pip uninstall -y")[2]


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
    assert doctor.count_nodes(session, Device("cuda")) == expected
    older = SimpleNamespace()
    assert doctor.count_nodes(older, Device("cuda")) == "not reported by this version of ONNX Runtime"


def test_the_device_is_chosen_for_the_bundle(onnxruntime_with, edit):
    def only_cpu(content):
        content["variants"] = {"cpu": content["variants"]["portable"]}

    onnxruntime_with(get_available_providers=lambda: [Device("openvino").provider, Device("cpu").provider])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # OpenVINO does not start here.
        rows, problems = doctor.examine(edit(only_cpu))
    assert problems == [] and rows["device auto"] == Device("cpu")
    assert rows["placement of"] == "tiny, cpu graphs, on cpu"


def test_problems_of_a_placement(tiny, copy):
    (copy / "bundle.json").write_text("{}")
    _, problems = doctor.examine(copy)
    assert "bundle.json" in problems[-1]
    _, problems = doctor.examine(tiny, "gpu")
    assert problems[-1].startswith("device: expected")


def test_why_a_provider_does_not_start(monkeypatch, onnxruntime_with, tmp_path):
    def refuse(*arguments, **options):
        raise RuntimeError("gave CPU")

    onnxruntime_with(__file__=str(tmp_path / "__init__.py"), InferenceSession=refuse, preload_dlls=lambda: None)
    monkeypatch.setattr(gpu, "find_gpus", lambda: "there is no NVIDIA driver")
    (tmp_path / "capi").mkdir()
    libraries = [
        tmp_path / "capi" / name for name in ("libonnxruntime_providers_cuda.so", "onnxruntime_providers_cuda.dll")
    ]
    for library in libraries:
        library.touch()  # An empty file is not a library.
    why = placement.probe(Device("cuda"))
    assert why.startswith("gave CPU (there is no NVIDIA driver; ") and "onnxruntime_providers_cuda" in why
    monkeypatch.setattr(gpu, "find_gpus", lambda: [Gpu("RTX", GIB, (8, 9))])
    for library in libraries:
        library.unlink()
    assert placement.probe(Device("cuda")) == "gave CPU"
    assert placement.probe(Device("cpu")) == "gave CPU"


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux lists them")  # noqa: PTH110
def test_libraries_are_listed_whatever_the_names_of_other_files_in_memory(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9", "wb+") as file:  # noqa: PTH123
        file.write(b"x")
        file.flush()
        with mmap.mmap(file.fileno(), 1):
            assert isinstance(doctor._loaded_libraries(), list)
