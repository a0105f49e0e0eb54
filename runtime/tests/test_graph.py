"""Runs on a CUDA device, tested without one: the CPU provider computes, and a fake records all copies and runs."""

import gc
import inspect
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from tiue_runtime import Pipeline
from tiue_runtime.errors import Cancelled, DeviceError, InferenceError, RequestError
from tiue_runtime.noise import gaussian
from tiue_runtime.ort.cuda_graphs import CudaGraphs
from tiue_runtime.ort.devices import Device
from tiue_runtime.ort.graph import Graph

HEART, STAR = "a red heart", "a blue star"
SHRINK, GRAPH_ID = "memory.enable_memory_arena_shrinkage", "gpu_graph_id"


class Value:
    """A fake OrtValue in the memory of `place`. A test compares its names with onnxruntime.OrtValue's."""

    def __init__(self, array, place):
        self.place = place
        self._array = np.array(array)

    @classmethod
    def ortvalue_from_numpy(cls, numpy_obj, device_type="cpu", device_id=0):
        books.copies += 1
        return cls(numpy_obj, (device_type, device_id))

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape, element_type=None, device_type="cpu", device_id=0):
        return cls(
            np.full(shape, np.nan if np.dtype(element_type).kind == "f" else -1, element_type), (device_type, device_id)
        )

    def update_inplace(self, data):
        assert (data.dtype, data.shape) == (self._array.dtype, self._array.shape) and data.flags.c_contiguous
        books.copies += 1
        self._array[...] = data

    def data_ptr(self):
        return self._array.ctypes.data

    def numpy(self):
        return self._array.copy()

    def shape(self):
        return list(self._array.shape)


class Binding:
    def __init__(self):
        self.inputs, self.outputs, self.made = {}, {}, []

    def bind_cpu_input(self, name, arr_on_cpu):
        assert arr_on_cpu.flags.c_contiguous
        books.copies += 1
        self.inputs[name] = Value(arr_on_cpu, ("cpu", 0))

    def bind_ortvalue_input(self, name, ortvalue):
        self.inputs[name] = ortvalue

    def bind_output(self, name, device_type="cpu", device_id=0):
        self.outputs[name] = (device_type, device_id)

    def bind_ortvalue_output(self, name, ortvalue):
        self.outputs[name] = ortvalue

    def get_outputs(self):
        return self.made


class Session:
    """Computes on the CPU. Like CUDA, a recording replays the addresses of the first run with its number."""

    def __init__(self, path_or_bytes, sess_options=None, providers=None, enable_fallback=True):
        assert not enable_fallback
        if books.unrecordable and providers[0][1].get("enable_cuda_graph"):
            raise RuntimeError("This session cannot use the graph capture feature")
        real = onnxruntime.InferenceSession(path_or_bytes, providers=["CPUExecutionProvider"])
        self._real, self.providers, self.options = real, providers, sess_options
        self.granted = [name for name, _ in providers or [(books.plugin, {})] if name not in books.refused]
        self.recordings, self.runs, self.from_host = {}, [], set()
        books.sessions.append(self)

    def get_providers(self):
        return self.granted

    def disable_fallback(self):
        pass

    def get_inputs(self):
        return self._real.get_inputs()

    def get_outputs(self):
        return self._real.get_outputs()

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, iobinding, run_options=None):
        entries = {}
        for key in (SHRINK, GRAPH_ID):
            try:
                entries[key] = run_options.get_run_config_entry(key)
            except (RuntimeError, AttributeError):
                continue
        self.runs.append(entries)
        if SHRINK in entries and books.no_arena:
            raise RuntimeError("Did not find an arena ... in the memory arena shrink list: gpu:0")
        self.from_host |= {name for name, value in iobinding.inputs.items() if value.place[0] == "cpu"}
        bound = iobinding
        if self.providers and self.providers[0][1].get("enable_cuda_graph") == "1":
            assert SHRINK not in entries
            number = entries[GRAPH_ID]  # Without this entry, ONNX Runtime would use 0.
            if number != "-1":
                assert int(number) > 0
                for value in (*iobinding.inputs.values(), *iobinding.outputs.values()):
                    assert isinstance(value, Value) and value.place == ("cuda", 0)
                bound = self.recordings.setdefault((threading.get_ident(), number), iobinding)
        feed = {name: value.numpy() for name, value in bound.inputs.items()}
        iobinding.made = []
        for result, place in zip(self._real.run(list(bound.outputs), feed), bound.outputs.values(), strict=True):
            if isinstance(place, Value):
                place._array[...] = result
            iobinding.made.append(place if isinstance(place, Value) else Value(result, place))


@pytest.fixture
def gpu(monkeypatch):
    """Install a fake onnxruntime with CUDA and TensorRT. Returns its records."""
    global books
    books = SimpleNamespace(sessions=[], copies=0, refused=(), no_arena=False, unrecordable=False)
    books.plugin = "NvTensorRTRTXExecutionProvider"
    fake = ModuleType("onnxruntime")
    fake.__version__, fake.__file__ = onnxruntime.__version__, onnxruntime.__file__
    fake.SessionOptions, fake.RunOptions = onnxruntime.SessionOptions, onnxruntime.RunOptions
    fake.InferenceSession, fake.OrtValue = Session, Value
    fake.preload_dlls = lambda: None
    fake.get_available_providers = lambda: [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return books


def by_name(books, names):
    """Return the sessions of a pipeline by name. They come after the probe's."""
    return dict(zip(names, books.sessions[-len(names) :], strict=True))


GRAPHS = ("text_encoder", "unet_encoder", "unet_decoder", "vae_decoder")


@pytest.fixture
def z_0(closed_form):
    """z_0(prompt, seed, height, width) is the tiny bundle's z_0, in closed form."""
    return lambda prompt, seed, h=4, w=6: closed_form(gaussian(seed, (4, h, w)), prompt)


def test_the_fake_has_the_names_of_onnxruntime():
    real = onnxruntime.OrtValue, onnxruntime.IOBinding, onnxruntime.InferenceSession
    for fake, original in zip((Value, Binding, Session), real, strict=True):
        for name, function in inspect.getmembers(fake, callable):
            if name.startswith("__") and name != "__init__":
                continue
            if name == "__init__" and fake is not Session:
                continue
            arguments = list(inspect.signature(function).parameters)
            expected = list(inspect.signature(getattr(original, name)).parameters)
            assert not set(arguments) - set(expected) - {"enable_fallback"}, (fake, name)


def test_cuda_keeps_features_there_and_copies_inputs_once(gpu, tiny, close, z_0):
    pipe = Pipeline.load(tiny, device="cuda")
    sessions = by_name(gpu, GRAPHS)
    for session in sessions.values():
        assert [name for name, _ in session.providers] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        assert session.options.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"
    gpu.copies = 0
    result = pipe(HEART, seed=7, memory="sequential", output_type="latent")
    close(result.images[0], z_0(HEART, 7))
    # The copies: input_ids and attention_mask; text and latents for both UNet graphs; index and weight of 4 steps.
    assert gpu.copies == 2 + 2 + 4 * 2
    assert sessions["unet_encoder"].from_host == set()
    assert sessions["unet_decoder"].from_host == {"step_index", "step_weight"}
    assert all(session.runs and set(session.runs[-1]) == {SHRINK} for session in list(sessions.values())[:3])
    assert sessions["unet_decoder"].runs[0][SHRINK] == "gpu:0"


def test_a_second_gpu_shrinks_its_own_arena(gpu, tiny):
    graph = Graph(tiny / "vae_decoder.onnx", Device("cuda", 1))
    kept = graph({"latents": np.zeros((1, 4, 2, 2), np.float32)}, keep_on_device=True)
    assert kept["image"].place == ("cuda", 1)
    assert gpu.sessions[-1].runs[-1][SHRINK] == "gpu:1"
    assert not graph.keeps


def test_an_allocator_without_arena_is_not_shrunk(gpu, tiny):
    gpu.no_arena = True
    graph = Graph(tiny / "vae_decoder.onnx", Device("cuda"))
    for _ in range(2):
        assert graph({"latents": np.zeros((1, 4, 2, 2), np.float32)})["image"].shape == (1, 3, 4, 4)
    assert [SHRINK in run for run in gpu.sessions[-1].runs] == [True, False, False]


def test_a_request_is_cancelled_while_it_waits_for_its_turn():
    graphs, turns = CudaGraphs(), []

    def give_up():
        turns.append(graphs.mode)
        raise Cancelled("cancelled before its turn")

    def second():
        with graphs.turn(give_up):
            turns.append("never")

    with graphs.turn():
        with ThreadPoolExecutor(1) as pool, pytest.raises(Cancelled):
            pool.submit(second).result()
        assert graphs.mode == "replay"
    assert (turns, graphs.mode) == (["replay"], None)


def test_recordings_with_the_real_onnxruntime(tiny):
    graphs = CudaGraphs()
    plain = Graph(tiny / "unet_decoder.onnx", Device("cpu"))
    graph = Graph(tiny / "unet_decoder.onnx", Device("cpu"), None, graphs)
    encoder = Graph(tiny / "unet_encoder.onnx", Device("cpu"), None, graphs)
    random = np.random.default_rng(0)
    steps = {"step_index": np.arange(4), "step_weight": np.ones(4, np.float32)}

    def run(size):
        known = {
            "latents": random.standard_normal((1, 4, size, size), np.float32),
            "text": random.standard_normal((1, 8, 3), np.float32),
        }
        before = {name: array.copy() for name, array in known.items()}
        with graphs.turn():
            features = encoder(known, keep_on_device=True)
            made = graph({**known, **features, **steps}, keep_on_device=True)["contribution"]
            gc.collect()
            result = made.numpy()
        expected = plain({**known, **{name: value.numpy() for name, value in features.items()}, **steps})
        np.testing.assert_array_equal(result, expected["contribution"])
        assert all((before[name] == array).all() for name, array in known.items())  # The caller's arrays are unchanged.
        return made.data_ptr()

    with graphs.recording():
        small, large = run(4), run(6)
    assert small != large
    assert [run(4), run(6), run(4)] == [small, large, small]
    assert run(8) not in (small, large)


@pytest.mark.parametrize("memory", ["parallel", "sequential"])
def test_recorded_shapes_are_replayed_with_new_inputs(gpu, tiny, close, z_0, memory):
    plain = Pipeline.load(tiny, device="cuda")
    pipe = Pipeline.load(tiny, device="cuda", cuda_graphs=True)
    sessions = by_name(gpu, GRAPHS)
    pipe.warmup(memory=memory)
    pipe.warmup(memory=memory, num_images=2)
    pipe.warmup(memory=memory)  # This shape is recorded already.
    gc.collect()
    for session in sessions.values():
        session.runs.clear()
    for prompt, seed in ((HEART, 7), (STAR, 8), (HEART, 9)):
        close(pipe(prompt, seed=seed, memory=memory, output_type="latent").images[0], z_0(prompt, seed))
        image = pipe(prompt, seed=seed, memory=memory, output_type="np").images
        np.testing.assert_array_equal(image, plain(prompt, seed=seed, memory=memory, output_type="np").images)
    both = pipe([HEART, STAR], seed=10, memory=memory, output_type="latent").images
    close(both, [z_0(HEART, 10), z_0(STAR, 11)])
    ids = {name: [run.get(GRAPH_ID) for run in session.runs] for name, session in sessions.items()}
    assert ids["unet_encoder"] == ["1"] * 6 + ["2"] and set(ids["unet_decoder"]) == {"1", "2"}
    assert ids["vae_decoder"] == ["1"] * 3
    assert set(ids["text_encoder"]) == {None}  # It is not recorded, so its arena is shrunk.
    assert all(len(session.recordings) == 2 for name, session in sessions.items() if name != "text_encoder")


def test_a_shape_that_was_not_warmed_up_runs_without(gpu, tiny, close, z_0):
    pipe = Pipeline.load(tiny, device="cuda", cuda_graphs=True)
    pipe.warmup()
    sessions = by_name(gpu, GRAPHS)
    for session in sessions.values():
        session.runs.clear()
    result = pipe(STAR, seed=3, height=16, width=8, output_type="latent")
    close(result.images[0], z_0(STAR, 3, 8, 4))
    close(pipe(STAR, seed=3, output_type="latent").images[0], z_0(STAR, 3))
    close(pipe(HEART, seed=3, memory="sequential", output_type="latent").images[0], z_0(HEART, 3))
    assert [run[GRAPH_ID] for run in sessions["unet_encoder"].runs] == ["-1", "1", "1"]
    # The decoder's other mode has another shape, although its features come from a recording.
    assert [run[GRAPH_ID] for run in sessions["unet_decoder"].runs] == ["-1", "1", "-1", "-1", "-1", "-1"]


def test_threads_take_turns(gpu, tiny, close, z_0):
    pipe = Pipeline.load(tiny, device="cuda", cuda_graphs=True)
    pipe.warmup(memory="sequential")

    def make(seed):
        prompt = HEART if seed % 2 else STAR
        return pipe(prompt, seed=seed, memory="sequential", output_type="latent").images[0], z_0(prompt, seed)

    with ThreadPoolExecutor(4) as threads:
        for made, expected in threads.map(make, range(40)):
            close(made, expected)
    # One thread made all recordings and replays. Recordings of another thread would not be found.
    assert {number for _, number in by_name(gpu, GRAPHS)["unet_decoder"].recordings} == {"1"}
    assert len(by_name(gpu, GRAPHS)["unet_decoder"].recordings) == 1


def test_a_request_within_a_callback_leaves_the_buffers_alone(gpu, tiny, close, z_0):
    pipe = Pipeline.load(tiny, device="cuda", cuda_graphs=True)
    pipe.warmup(memory="sequential")
    inner = []

    def callback(progress):
        if progress.stage == "unet_decoder":
            inner.append(pipe(STAR, seed=progress.step, memory="sequential", output_type="latent").images[0])

    close(pipe(HEART, seed=5, callback=callback, output_type="latent").images[0], z_0(HEART, 5))
    close(inner, [z_0(STAR, step) for step in (1, 2, 3, 4)])


def test_a_request_cannot_free_recordings(gpu, tiny):
    pipe = Pipeline.load(tiny, device="cuda", cuda_graphs=True)
    loaded = len(gpu.sessions)
    for call in (pipe.warmup, lambda **options: pipe(HEART, **options)):
        with pytest.raises(RequestError, match=r'cuda_graphs: .* memory="low"'):
            call(memory="low")
    pipe(HEART)
    assert len(gpu.sessions) == loaded


def test_graphs_that_cannot_be_recorded(gpu, tiny):
    gpu.unrecordable = True
    message = r"unet_encoder\.onnx cannot be loaded on cuda: This session .* feature\. cuda_graphs=True needs"
    with pytest.raises(DeviceError, match=message):
        Pipeline.load(tiny, device="cuda", cuda_graphs=True)


def test_a_failure_on_the_recording_thread(gpu, tiny):
    pipe = Pipeline.load(tiny, device="cuda", cuda_graphs=True)
    with pytest.raises(InferenceError, match="vae_decoder failed on cuda"):
        pipe.graphs.vae_decoder({"latents": np.zeros((1, 2), np.float32)})


def test_tensorrt_first_then_cuda(gpu, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TIUE_CACHE", str(tmp_path))
    pipe = Pipeline.load(tiny, device="tensorrt", provider_options={"trt_max_workspace_size": 7})
    assert pipe.device == "tensorrt"
    directories = set()
    for session in by_name(gpu, GRAPHS).values():
        names, (options, _, _) = zip(*session.providers, strict=True)
        assert names == ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
        assert options["trt_max_workspace_size"] == "7"
        directories.add(options["trt_engine_cache_path"])
    assert len(directories) == len(GRAPHS)
    pipe.warmup()
    assert pipe(HEART, seed=1).device == "tensorrt"
    assert by_name(gpu, GRAPHS)["unet_decoder"].runs[-1] == {}


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_granted(gpu, tiny, device):
    gpu.refused = (Device(device).provider,)
    with pytest.raises(DeviceError, match=f"'{device}' could not be started: ONNX Runtime gave .*nvidia-smi"):
        Pipeline.load(tiny, device=device)
    with pytest.raises(DeviceError, match=f"asked for {device} .*, got C"):
        Graph(tiny / "vae_decoder.onnx", Device(device))


def test_a_plugin_is_registered_once_and_its_devices_are_used(gpu, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TIUE_CACHE", str(tmp_path))
    with pytest.raises(DeviceError, match=r"'tensorrt-rtx' needs NvTensorRTRTX.*pip install .*tensorrt-rtx"):
        Pipeline.load(tiny, device="tensorrt-rtx")
    fake, found, registered, added = sys.modules["onnxruntime"], [], [], []
    plugin = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    plugin.__spec__ = SimpleNamespace(name=plugin.__name__)
    plugin.get_library_path = lambda: "library"
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)

    def register(registration_name, library_path):
        registered.append((registration_name, library_path))
        found.extend(SimpleNamespace(ep_name=name) for name in ("CPUExecutionProvider", gpu.plugin))

    class Options(onnxruntime.SessionOptions):
        def add_provider_for_devices(self, devices, options):
            added.append((devices, options))

    fake.register_execution_provider_library, fake.get_ep_devices = register, lambda: found
    fake.SessionOptions = Options
    Pipeline.load(tiny, device="tensorrt-rtx")
    assert registered == [(gpu.plugin, "library")]
    assert all(devices == [found[1]] for devices, _ in added) and len(added) == 1 + len(GRAPHS)
    assert "nv_runtime_cache_path" not in added[0][1] and "nv_runtime_cache_path" in added[1][1]
    with pytest.raises(DeviceError, match=r"'tensorrt-rtx:1' could not be started: .* finds 1 GPUs"):
        Pipeline.load(tiny, device="tensorrt-rtx:1")
