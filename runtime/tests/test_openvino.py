"""OpenVINO as a device: its options, and, if its wheel is installed, its results."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle
from tiue_runtime.bundle.find import find_bundle, installed_bundles
from tiue_runtime.errors import DeviceError, OutOfMemoryError, is_out_of_memory
from tiue_runtime.host import machine
from tiue_runtime.noise import gaussian
from tiue_runtime.ort import sessions
from tiue_runtime.ort.devices import KINDS, Device, Settings, provider_options
from tiue_runtime.ort.graph import Graph
from tiue_runtime.ort.placement import place
from tiue_runtime.tools import doctor

OPENVINO = Device("openvino")
HEART = "a red heart"
EQUAL = {"rtol": 1e-4, "atol": 2e-4}  # float32 against float32, with sums in another order
REDUCED = 35  # dB of peak signal to noise, the floor of exports in a reduced precision

real = pytest.mark.skipif(
    OPENVINO.provider not in sessions.available_providers(), reason="ONNX Runtime with OpenVINO is not installed"
)
emoji = pytest.mark.skipif("emoji" not in installed_bundles(), reason="tiue-emoji is not installed")


def psnr(actual, expected):
    return 10 * np.log10(np.ptp(expected) ** 2 / max(np.mean((actual - expected) ** 2), 1e-30))


def test_options(monkeypatch):
    monkeypatch.setattr("tiue_runtime.ort.devices.thread_count", lambda: 6)

    def config(settings):
        [(name, options)] = provider_options(OPENVINO, settings)
        assert name == "OpenVINOExecutionProvider" and options["device_type"] == "CPU"
        return json.loads(options["load_config"])

    assert config(Settings()) == {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "6"}}
    asked = config(Settings(precision="bf16", threads=3))
    assert asked == {"CPU": {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": "3"}}
    given = {"device_type": "GPU", "load_config": {"GPU": {"PERFORMANCE_HINT": "LATENCY"}}}
    [(_, options)] = provider_options(OPENVINO, Settings(given))
    assert options == {"device_type": "GPU", "load_config": '{"GPU": {"PERFORMANCE_HINT": "LATENCY"}}'}
    assert provider_options(OPENVINO, Settings({"device_type": "NPU"})) == [(OPENVINO.provider, {"device_type": "NPU"})]


@pytest.mark.parametrize(
    "device, options, message",
    [
        ("cpu", dict(precision="fp32"), 'precision: expected device="openvino", got cpu'),
        ("openvino", dict(precision="fp16"), r'precision: expected "bf16" or "fp32", or None.*got .fp16'),
        (
            "openvino",
            dict(provider_options={"device_type": "GPU"}, precision="fp32"),
            "precision: follows from device_type",
        ),
        (
            "openvino",
            dict(provider_options={"load_config": "{}"}, threads=1),
            "threads: follows from device_type and load_config",
        ),
        ("openvino", dict(cuda_graphs=True), 'cuda_graphs: expected device="cuda", got openvino'),
        ("cpu", dict(threads=0), "threads: expected an integer from 1 to 4096, or None for all CPUs, got 0"),
        ("cpu", dict(threads="4"), "threads: expected an integer from 1 to 4096, or None for all CPUs, got '4'"),
        ("cpu", dict(threads=True), "threads: expected an integer from 1 to 4096, or None for all CPUs, got True"),
    ],
)
def test_settings_that_contradict_the_device(device, options, message):
    with pytest.raises(DeviceError, match=message):
        place(device, **options)


def test_precision_needs_the_device_by_name(tiny):
    with pytest.raises(DeviceError, match='precision: expected the device that it is for, got device="auto"'):
        Pipeline.load(tiny, precision="fp32")


@pytest.mark.parametrize(
    "flag, bf16, asked, granted",
    [
        (True, True, None, "bf16"),
        (True, True, "bf16", "bf16"),
        (True, True, "fp32", "fp32"),
        (True, False, None, "fp32"),  # The CPU has bf16, but OpenVINO does not use it.
        (False, True, None, "fp32"),  # OpenVINO imitates bf16, which is slow.
        (False, True, "bf16", "bf16"),
        (False, False, None, "fp32"),
    ],
)
def test_the_precision_is_the_one_that_openvino_proves(granting, monkeypatch, flag, bf16, asked, granted):
    granting({"openvino": ""}, bf16)
    monkeypatch.setattr(machine, "has_bf16", lambda: flag)
    placement = place("openvino", precision=asked)
    assert placement.precision == placement.settings.precision == granted


def test_bf16_that_openvino_would_compute_in_float32_is_refused(granting):
    granting({"openvino": ""})
    with pytest.raises(DeviceError, match=r'OpenVINO computes in float32 on this CPU.*Load with "fp32"'):
        place("openvino", precision="bf16")


def test_precision_of_other_devices_is_not_settled(granting, monkeypatch):
    granting({"cpu": "", "cuda": "", "openvino": ""}, bf16=True)
    monkeypatch.setattr(machine, "has_bf16", lambda: True)
    for device, given in (("cpu", {}), ("cuda", {}), ("openvino", {"device_type": "GPU"})):
        assert place(device, provider_options=given).settings == Settings(given)


@pytest.mark.parametrize(
    "flags, found", [("fma avx512_bf16 avx", True), ("amx_bf16", True), ("avx512f avx_vnni", False)]
)
def test_instructions_of_the_cpu(tmp_path, flags, found):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nmodel name\t: bf16\nflags\t\t: fpu {flags}\nbugs\t:\n")
    assert machine.has_bf16(tmp_path) is found
    assert not machine.has_bf16(tmp_path / "elsewhere")


def test_auto(granting, monkeypatch):
    monkeypatch.setattr(machine, "has_bf16", lambda: False)
    problems = {"cuda": "no driver", "openvino": "no library", "cpu": ""}
    granting(problems)
    with pytest.warns(UserWarning, match="running on the CPU, because") as said:
        assert place("auto").device == Device("cpu")
    assert [str(warning.message).partition(" could")[0].split()[-1] for warning in said] == ["CUDA", "OpenVINO"]
    problems["openvino"] = ""
    with pytest.warns(UserWarning, match="because CUDA could not be started"):
        assert place("auto").device == OPENVINO
    problems["cuda"] = ""
    assert place("auto").device == Device("cuda")


@pytest.mark.parametrize(
    "variants, bf16, expected",
    [
        (("portable",), False, "cuda"),
        (("cuda",), False, "cuda"),
        (("cpu",), True, "cpu"),
        (("portable", "cpu"), False, "cuda"),
    ],
)
def test_auto_skips_devices_that_run_none_of_the_graphs(granting, monkeypatch, variants, bf16, expected):
    granting({"cuda": "", "openvino": "", "cpu": ""})
    monkeypatch.setattr(machine, "has_bf16", lambda: bf16)
    assert place("auto", variants).device == Device(expected)


@pytest.mark.parametrize(
    "held, asked, bf16, expected",
    [
        (("cpu",), None, True, "cpu"),  # OpenVINO cannot run it.
        (("portable", "cpu"), "cpu", True, "cpu"),
        (("portable", "cpu"), None, True, "openvino"),
        (("portable", "cpu"), None, False, "cpu"),  # faster in float32
        (("portable", "cpu"), "portable", False, "openvino"),
        (("portable",), None, False, "openvino"),
    ],
)
def test_auto_on_a_cpu(imitated, monkeypatch, edit, held, asked, bf16, expected):
    monkeypatch.setattr(machine, "has_bf16", lambda: bf16)
    bundle = edit(lambda content: content.update(variants=dict.fromkeys(held, content["variants"]["portable"])))
    pipe = Pipeline.load(bundle, device="auto", variant=asked)
    assert (pipe.device, pipe.variant) == (expected, asked or ("portable" if expected == "openvino" else "cpu"))


def test_nodes_left_to_the_cpu_are_reported(onnxruntime_with, tiny):
    """ONNX Runtime lists OpenVINO first even if it runs no node of a graph: tiny's vae_decoder is too small for it."""

    def without_openvino(model, sess_options, **_):
        if sess_options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1":
            raise RuntimeError(f"nodes are assigned to the default CPU EP, but {sessions.LEFT_NODES} by the user.")
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: [OPENVINO.provider, "CPUExecutionProvider"]
        return session

    onnxruntime_with(InferenceSession=without_openvino)
    with pytest.warns(UserWarning, match=r"vae_decoder\.onnx: openvino leaves nodes to ONNX Runtime's CPU provider"):
        Graph(tiny / "vae_decoder.onnx", OPENVINO)


@pytest.fixture
def imitated(monkeypatch):
    """OpenVINO's row with ONNX Runtime's CPU provider behind it, on a CPU without bf16 instructions."""
    row = replace(
        KINDS["openvino"], provider="CPUExecutionProvider", options=lambda *_: {}, must_take_all=False, library=""
    )
    monkeypatch.setitem(KINDS, "openvino", row)
    monkeypatch.setattr(machine, "has_bf16", lambda: False)


def test_auto_records_nothing_if_it_chooses_openvino(imitated, tiny):
    pipe = Pipeline.load(tiny, device="auto", cuda_graphs=True)
    assert (pipe.device, pipe.cuda_graphs) == ("openvino", False)


def test_memory_is_given_back_by_reloading(monkeypatch, imitated, tiny):
    graph = Graph(tiny / "vae_decoder.onnx", OPENVINO)
    first, feed = graph.session(), {"latents": np.ones((1, 4, 2, 3), dtype=np.float32)}
    kept = graph(feed)
    assert graph.session() is first
    released = graph(feed, release=True)
    second = graph.session()
    assert second is not first

    def fail(*_):
        raise RuntimeError("Failed to allocate 33554432 bytes of memory")

    monkeypatch.setattr(second, "run_with_iobinding", fail)
    with pytest.raises(OutOfMemoryError, match="vae_decoder ran out of memory on openvino"):
        graph(feed)
    assert graph.session() is not second
    np.testing.assert_array_equal(released["image"], kept["image"])


def test_openvinos_message_of_exhausted_memory():
    error = RuntimeError(
        "Status Message: /onnxruntime/ov_interface.cc:24 auto OvExceptionBoundary() [OpenVINO-EP] Couldn't start "
        "Inference:\nException from src/node.cpp:792:\nFailed to allocate 33554432 bytes of memory\n\n"
    )
    assert is_out_of_memory(error) and sessions.first_line(error) == "Failed to allocate 33554432 bytes of memory"


def test_threads(tiny, monkeypatch):
    def threads(pipe):
        return pipe.graphs.unet_decoder.session().get_session_options().intra_op_num_threads

    monkeypatch.setattr("tiue_runtime.ort.devices.thread_count", lambda: 2)
    assert threads(Pipeline.load(tiny, device="cpu")) == 2
    assert threads(Pipeline.load(tiny, device="cpu", threads=1)) == 1


@real
def test_granted(tiny):
    assert place("openvino").device == OPENVINO
    with pytest.raises(DeviceError, match=r"openvino. could not be started: .*Intel"):
        place("openvino", provider_options={"device_type": "GPU.7"})
    with pytest.warns(UserWarning, match="vae_decoder"):
        pipe = Pipeline.load(tiny, device="openvino", precision="fp32")
    result = pipe(HEART, seed=1)
    assert (pipe.device, result.device, pipe.precision, result.precision) == ("openvino", "openvino", "fp32", "fp32")


@real
@pytest.mark.filterwarnings("ignore:vae_decoder.onnx. openvino leaves nodes")
def test_openvino_equals_the_closed_form(tiny, closed_form, close):
    pipe = Pipeline.load(tiny, device="openvino", precision="fp32")
    for height, width, memory in ((4, 6, "parallel"), (8, 2, "sequential"), (4, 6, "partial")):
        z_t = np.stack([gaussian(seed, (4, height, width)) for seed in (1, 2)])
        made = pipe(HEART, num_images=2, latents=z_t, output_type="latent", memory=memory).images
        close(made, np.stack([closed_form(z, HEART) for z in z_t]))


@real
@emoji
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_default_model(precision):
    """OpenVINO runs all nodes of all graphs, also of the int8 text encoder, at changing shapes."""
    if precision == "bf16" and not machine.has_bf16():
        with pytest.raises(DeviceError, match="bf16"):
            Pipeline.load("emoji", device="openvino", precision=precision)
        pytest.skip("this CPU has no bf16 instructions, so bf16 is refused")
    expected, actual = (
        Pipeline.load("emoji", device="cpu"),
        Pipeline.load("emoji", device="openvino", precision=precision),
    )
    graphs = tuple(actual.graphs)
    assert all(sessions.took_all(graph.session()) for graph in graphs)
    for size, count, memory in ((64, 1, "parallel"), (96, 3, "sequential"), (64, 2, "partial"), (64, 1, "parallel")):
        options = {"num_images": count, "seed": 3, "height": size, "memory": memory, "output_type": "np"}
        ours, theirs = expected(HEART, **options).images, actual(HEART, **options).images
        assert psnr(theirs, ours) >= REDUCED
        if precision == "fp32":
            np.testing.assert_allclose(theirs, ours, **EQUAL)


@real
@emoji
def test_several_threads_at_once():
    pipe = Pipeline.load("emoji", device="openvino")

    def run(seed):
        return pipe(HEART, seed=seed, output_type="np").images

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for images, expected in zip(pool.map(run, range(4)), alone, strict=True):
            np.testing.assert_array_equal(images, expected)


@real
def test_the_doctor_shows_where_nodes_run(tiny):
    rows, problems = doctor.examine(tiny, "openvino")
    assert problems == []
    precision = place("openvino").precision
    assert rows["provider openvino"] == f"yes: {OPENVINO.provider} starts and computes in {precision}"
    assert rows["placement of"] == f"tiny, portable graphs, on openvino in {precision}"
    assert str(rows["nodes of unet_decoder"]).startswith((f"{OPENVINO.provider} 8", f"all on {OPENVINO.provider}"))
    left = ("CPUExecutionProvider 2 (1 Slice, 1 Resize)", f"not all on {OPENVINO.provider}")
    assert str(rows["nodes of vae_decoder"]).startswith(left)
    if "emoji" in installed_bundles():
        path = Bundle.load(find_bundle("emoji")).directory
        nodes = {k: str(v) for k, v in doctor.examine(path, "openvino")[0].items() if k.startswith("nodes of")}
        assert len(nodes) == 4 and not any("CPUExecution" in text or "not all" in text for text in nodes.values())
