import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from tiue_runtime import Pipeline
from tiue_runtime.bundle import pulled
from tiue_runtime.errors import BundleError, DeviceError, TiueError
from tiue_runtime.noise import gaussian
from tiue_runtime.ort import engines as cache
from tiue_runtime.ort.devices import KINDS, Device, Kind, Settings, parse_device, provider_options
from tiue_runtime.ort.graph import Graph
from tiue_runtime.ort.placement import place

BOTH = ("portable", "cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_devices_and_their_names(kind):
    assert parse_device(kind) == Device(kind)
    assert str(Device(kind)) == kind
    if kind not in ("cpu", "openvino"):
        assert parse_device(f"{kind}:1") == Device(kind, 1)
        assert str(Device(kind, 1)) == f"{kind}:1"


@pytest.mark.parametrize(
    "device",
    [
        "gpu",
        "",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:²",
        "cuda:99999",
        "cpu:1",
        "CPU",
        "openvino:1",
        "tensorrt:",
        3,
        None,
    ],
)
def test_refuses_other_devices(device):
    with pytest.raises(DeviceError, match=r"device: expected .*got") as caught:
        place(device)
    assert all(f'"{kind}"' in str(caught.value) for kind in ("auto", *KINDS))


@pytest.mark.parametrize(
    "device, held, expected",
    [
        ("cpu", BOTH, "portable"),
        ("cpu", (*BOTH, "cpu"), "cpu"),
        ("openvino", (*BOTH, "cpu"), "portable"),
        ("cuda", BOTH, "cuda"),
        ("cuda", ("portable",), "portable"),
        ("tensorrt", BOTH, "portable"),
        ("tensorrt-rtx:1", BOTH, "portable"),
    ],
)
def test_a_device_runs_the_best_of_its_variants(granting, device, held, expected):
    granting(dict.fromkeys(KINDS, ""))
    placement = place(device, held)
    assert (str(placement.device), placement.variant) == (device, expected)


def test_a_variant_by_name(granting):
    granting(dict.fromkeys(KINDS, ""))
    assert place("cuda", BOTH, variant="portable").variant == "portable"
    for variant in ("cuda", "", 3, ["cuda"]):
        with pytest.raises(BundleError, match=r"variant: expected one that the bundle holds \(portable\), got"):
            place("cuda", ["portable"], variant=variant)
    for kind in ("cpu", "tensorrt", "tensorrt-rtx"):
        with pytest.raises(DeviceError, match=rf"variant: {kind} runs (cpu, )?portable( or web)? graphs, got 'cuda'"):
            place(kind, BOTH, variant="cuda")


def test_a_bundle_without_graphs_for_the_device():
    with pytest.raises(DeviceError, match="variant: cpu runs cpu, portable or web graphs, the bundle holds only cuda"):
        place("cpu", ["cuda"])


def test_another_provider_is_one_row(monkeypatch, tiny, close, closed_form):
    """Only a row is added. Its policies are followed. Its sessions are those of the CPU provider."""
    row = Kind(
        "CPUExecutionProvider",
        "Another",
        "another",
        gives_back="by reloading",
        options=lambda device, settings: {},
        session_entries={"session.set_denormal_as_zero": "1"},
    )
    monkeypatch.setitem(KINDS, "another", row)
    pipe = Pipeline.load(tiny, device="another")
    assert pipe.device == "another" and pipe("a red heart", seed=1).device == "another"
    z_t = gaussian(3, (4, 4, 6))
    made = pipe("a red heart", latents=z_t[None], output_type="latent").images
    close(made[0], closed_form(z_t, "a red heart"))
    graph = Graph(tiny / "vae_decoder.onnx", Device("another"))
    first = graph.session()
    entry = first.get_session_options().get_session_config_entry("session.set_denormal_as_zero")
    graph({"latents": np.zeros((1, 4, 2, 2), np.float32)}, release=True)
    assert entry == "1" and graph.session() is not first
    with pytest.raises(DeviceError, match='"another"'):
        place("nonsense")


def test_a_pipeline_loads_the_files_of_its_variant(edit):
    def add_a_copy(content):
        content["variants"]["cuda"] = {**content["variants"]["portable"], "vae_decoder": "cuda.onnx"}
        content["files"]["cuda.onnx"] = {"sha256": hashlib.sha256(b"no graph").hexdigest(), "size": len(b"no graph")}

    bundle = edit(add_a_copy)
    (bundle / "cuda.onnx").write_bytes(b"no graph")
    Pipeline.load(bundle, device="cpu")
    Pipeline.load(bundle, device="cpu", variant="portable")
    with pytest.raises(DeviceError, match="variant: cpu runs cpu, portable or web graphs, got 'cuda'"):
        Pipeline.load(bundle, device="cpu", variant="cuda")


def test_options_of_cuda():
    (name, options), rest = provider_options(Device("cuda", 1), Settings())
    assert (name, rest) == ("CUDAExecutionProvider", ("CPUExecutionProvider", {}))
    assert options == {
        "device_id": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    settings = Settings({"cudnn_conv_algo_search": "DEFAULT", "gpu_mem_limit": 2**31, "use_tf32": False}, True)
    [(_, given), _] = provider_options(Device("cuda"), settings)
    assert given["enable_cuda_graph"] == "1" and given["arena_extend_strategy"] == "kSameAsRequested"
    assert (given["cudnn_conv_algo_search"], given["gpu_mem_limit"], given["use_tf32"]) == (
        "DEFAULT",
        "2147483648",
        "0",
    )


def test_options_of_tensorrt():
    settings = Settings({"trt_max_workspace_size": 5}, cache=Path("cached"))
    (name, options), cuda, cpu = provider_options(Device("tensorrt", 1), settings)
    assert (name, cpu) == ("TensorrtExecutionProvider", ("CPUExecutionProvider", {}))
    assert (
        cuda[0] == "CUDAExecutionProvider" and cuda[1]["device_id"] == "1" and "trt_max_workspace_size" not in cuda[1]
    )
    assert options == {
        "device_id": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "cached",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "cached",
        "trt_max_workspace_size": "5",
    }
    [(_, rtx), _] = provider_options(Device("tensorrt-rtx"), Settings(cache=Path("cached")))
    assert rtx == {"device_id": "0", "nv_runtime_cache_path": "cached"}


@pytest.mark.parametrize(
    "device, options, message",
    [
        ("cpu", dict(provider_options={"a": 1}), "provider_options: cpu has none, got a"),
        ("cpu", dict(cuda_graphs=True), 'cuda_graphs: expected device="cuda", got cpu'),
        ("tensorrt", dict(cuda_graphs=True), 'cuda_graphs: expected device="cuda", got tensorrt'),
        ("cuda", dict(provider_options={"device_id": 1}), "provider_options: device_id follows from device="),
        # With this option alone, ONNX Runtime would replay one recording for all shapes.
        (
            "cuda",
            dict(provider_options={"enable_cuda_graph": True}),
            "provider_options: enable_cuda_graph follows from cuda_graphs=",
        ),
    ],
)
def test_settings_that_contradict_the_device(device, options, message):
    with pytest.raises(DeviceError, match=message):
        place(device, **options)


class Strange:
    """Fails at whatever it is asked."""

    __eq__ = __bool__ = __index__ = __iter__ = __repr__ = lambda *_: 1 / 0  # pyright: ignore[reportAssignmentType]
    __hash__ = object.__hash__


OTHERS = [1.5, "x" * 5000, "a\n\x1b[31m", 10**6000, -1, Strange(), b"cpu", {1}, [1], ("cpu",), np.array([1, 2]), print]


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize(
    "name, others",
    [
        ("device", [None, 5, True, "", "CPU", "cuda:-1", "cuda:x", "\ud800", *OTHERS]),
        ("variants", [None, 5, True, "cpu", [1], *(value for value in OTHERS if value is not OTHERS[9])]),
        ("variant", [5, True, "", *OTHERS]),
        ("provider_options", [5, True, "", *OTHERS]),
        ("precision", [5, True, "", *OTHERS]),
        ("threads", [0, 5000, True, "1", *OTHERS]),
        ("cuda_graphs", [None, 5, "", *OTHERS]),
    ],
)
def test_strange_arguments_are_refused_in_a_line(device, name, others):
    for value in others:
        with pytest.raises(TiueError) as caught:
            place(**{"device": device, name: value})
        said = str(caught.value)
        assert name.removesuffix("s") in said and len(said) < 500 and said.isprintable()


def test_settings_of_a_pipeline(tiny, onnxruntime_with):
    with pytest.raises(DeviceError, match="cuda_graphs: expected"):
        Pipeline.load(tiny, device="cpu", cuda_graphs=True)
    with pytest.raises(DeviceError, match='provider_options: expected the device that it is for, got device="auto"'):
        Pipeline.load(tiny, provider_options={"a": 1})
    onnxruntime_with(get_available_providers=lambda: ["CPUExecutionProvider"])
    pipe = Pipeline.load(tiny, device="auto", cuda_graphs=True)  # There is nothing to record on the CPU.
    pipe.warmup(num_images=2)
    assert pipe("a red heart", seed=1).device == "cpu"


def test_compiled_graphs_are_kept_by_content_device_and_version(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("TIUE_CACHE", str(tmp_path / "kept"))
    device, graph = Device("tensorrt", 1), copy / "vae_decoder.onnx"

    def directory(device=device, graph=graph):
        return cache.with_cache(Settings(), device, copy, graph).cache

    first = directory()
    assert first.is_dir() and first.is_relative_to(tmp_path / "kept")
    assert hashlib.sha256((copy / "bundle.json").read_bytes()).hexdigest() in first.parts
    assert directory() == first
    assert directory(graph=copy / "unet_decoder.onnx") != first
    assert directory(graph=copy / "cuda" / "vae_decoder.onnx") != first
    assert directory(device=Device("tensorrt")) != first and directory(device=Device("tensorrt-rtx", 1)) != first
    assert directory(device=Device("cuda")) is None and directory(device=Device("cpu")) is None
    (copy / "bundle.json").write_bytes((copy / "bundle.json").read_bytes() + b"\n")
    assert directory() != first
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIUE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DeviceError, match=r"no place to keep compiled graphs: .*TIUE_CACHE"):
        directory()


@pytest.mark.parametrize(
    "platform, variables, expected",
    [
        ("linux", {}, "home/.cache/tiue"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/tiue"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/tiue"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "home/Library/Caches/tiue"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/tiue/cache"),
        ("win32", {}, "home/AppData/Local/tiue/cache"),
        ("linux", {"TIUE_CACHE": "here"}, "here"),
    ],
)
def test_where_files_are_kept(monkeypatch, platform, variables, expected):
    for name in ("TIUE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pulled.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert os.fspath(pulled.cache_root()) == os.fspath(Path(expected))
