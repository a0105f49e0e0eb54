"""Memory: free memory, runs that fit, and runs that fail, with real and simulated shortage."""

import ctypes
import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from tiue_runtime import Pipeline
from tiue_runtime import budget as memory
from tiue_runtime.budget import Budget
from tiue_runtime.bundle import Bundle, MemoryUse
from tiue_runtime.errors import BundleError, InferenceError, OutOfMemoryError, RequestError, is_out_of_memory
from tiue_runtime.host import memory as host_memory
from tiue_runtime.host.memory import free_memory
from tiue_runtime.modes import lower_mode, timesteps_at_once
from tiue_runtime.ort import graph as graph_module
from tiue_runtime.ort import sessions
from tiue_runtime.ort.devices import Device, Settings
from tiue_runtime.ort.graph import Graph
from tiue_runtime.ort.placement import Placement

HEART, STAR = "a red heart", "a blue star"
CPU = Device("cpu")
ORDER_OF_SUMS = 1e-5  # difference between modes, which add the same float32 numbers in another order
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")


class Scarce:
    """A graph that runs out of memory with more than `most` rows or `latents` latent pixels."""

    def __init__(self, graph, most=1e9, latents=1e9):
        self._graph, self._most, self._latents = graph, most, latents
        self.seen = []

    def __call__(self, feed, **options):
        rows, _, height, width = feed["latents"].shape if "latents" in feed else (1, 1, 1, 1)
        rows *= len(feed.get("step_index", [0]))
        self.seen.append((rows, height, width))
        if rows > self._most or height * width > self._latents:
            raise OutOfMemoryError(f"{self._graph.name} ran out of memory on cpu")
        return self._graph(feed, **options)

    def __getattr__(self, name):
        return getattr(self._graph, name)


@pytest.fixture
def free(monkeypatch):
    """free(bytes) simulates an amount of free memory. None: unknown."""
    return lambda value: monkeypatch.setattr(memory, "free_memory", lambda device: value)


def rows_of(graph):
    return [rows for rows, *_ in graph.seen]


def test_modes_go_down_to_one_timestep():
    assert [timesteps_at_once(mode, 4) for mode in ("parallel", "partial", "sequential")] == [4, 2, 1]
    assert (lower_mode("parallel", 4), lower_mode("partial", 4)) == ("partial", "sequential")
    assert lower_mode("parallel", 2) == "sequential"  # "partial" would repeat the same run.
    assert lower_mode("sequential", 4) is lower_mode("parallel", 1) is None


@pytest.mark.parametrize("steps", [2, 4])
def test_partial_mode_runs_two_timesteps_at_once(pipe, monkeypatch, close, steps):
    graph = Scarce(pipe.graphs.unet_decoder)
    expected = pipe(HEART, seed=7, steps=steps, output_type="latent").images
    monkeypatch.setattr(pipe.graphs, "unet_decoder", graph)
    seen = []
    result = pipe(HEART, seed=7, steps=steps, memory="partial", output_type="latent", callback=seen.append)
    close(result.images, expected)
    assert (result.memory, rows_of(graph)) == ("partial", [2] * (steps // 2))
    seen = [progress for progress in seen if progress.stage == "unet_decoder"]
    assert [(progress.step, progress.steps) for progress in seen] == [(i, steps) for i in range(2, steps + 1, 2)]
    assert all(progress.latents is None for progress in seen[:-1])
    close(seen[-1].latents, expected)


@pytest.mark.parametrize(
    "asked, most, used, rows",
    [
        ("auto", 7, "partial", [8, 4, 4]),
        ("parallel", 3, "sequential", [8, 4, 2, 2, 2, 2]),
        ("partial", 2, "sequential", [4, 2, 2, 2, 2]),
    ],
)
def test_running_out_of_memory_continues_in_the_next_lower_mode(pipe, monkeypatch, close, asked, most, used, rows):
    expected = pipe([HEART, STAR], seed=7, output_type="np").images
    graph = Scarce(pipe.graphs.unet_decoder, most)
    monkeypatch.setattr(pipe.graphs, "unet_decoder", graph)
    with pytest.warns(UserWarning) as caught:
        result = pipe([HEART, STAR], seed=7, memory=asked, output_type="np")
    close(result.images, expected)
    assert (result.memory, rows_of(graph)) == (used, rows)
    assert len(caught) == rows.count(8) + (used == "sequential")
    first = "parallel" if asked == "auto" else asked
    below = "partial" if first == "parallel" else "sequential"
    message = f"unet_decoder ran out of memory on cpu in {first} mode: continuing in {below} mode"
    assert str(caught[0].message) == message and caught[0].filename == __file__


def test_the_lowest_mode_names_the_stage_and_the_remedy(heavy_pipe, monkeypatch):
    monkeypatch.setattr(heavy_pipe.graphs, "unet_decoder", Scarce(heavy_pipe.graphs.unet_decoder, most=0))
    message = r'unet_decoder ran out .*: make smaller pictures, fewer at once, with memory="low", load with vae="tiny"$'
    with pytest.raises(OutOfMemoryError, match=message):
        heavy_pipe(HEART, seed=7, memory="sequential", height=8, width=8)


@pytest.mark.parametrize("graph", ["text_encoder", "unet_encoder"])
def test_other_graphs_have_no_lower_mode(pipe, monkeypatch, graph):
    scarce = Scarce(getattr(pipe.graphs, graph), most=0)
    monkeypatch.setattr(pipe.graphs, graph, scarce)
    with pytest.raises(OutOfMemoryError, match=f"^{graph} ran out of memory on cpu: make smaller pictures"):
        pipe(HEART)


def test_auto_takes_the_fastest_mode_that_fits(heavy_pipe, free):
    step = 16 * 16 * heavy_pipe.bundle.manifest.memory["portable"]["unet_decoder"].per_latent / memory.USABLE
    size = {"height": 32, "width": 32, "output_type": "latent"}
    # Begin with the least memory: a graph keeps the memory of a run, so a run of 2 steps then needs only one more.
    for bytes_free, expected in [(0, "sequential"), (0.9, "sequential"), (1.1, "partial"), (1.9, "partial"),
                                 (2.1, "parallel"), (0, "parallel")]:  # fmt: skip
        free(int(step * bytes_free))
        assert heavy_pipe(HEART, seed=1, **size).memory == expected
    free(int(step * 1.9))
    assert heavy_pipe(HEART, seed=1, num_images=3, **size).memory == "sequential"
    assert heavy_pipe(HEART, seed=1, memory="partial", **size).memory == "partial"  # The caller chose it.
    assert heavy_pipe(HEART, seed=1, callback=lambda *_: None, **size).memory == "sequential"
    free(None)
    assert heavy_pipe(HEART, seed=1, num_images=3, **size).memory == "parallel"


def test_without_an_estimate_everything_fits(pipe, free):
    free(0)
    result = pipe(HEART)
    assert (result.memory, result.tile) == ("parallel", None)


def test_a_variant_without_estimates_takes_those_of_portable(heavy, free):
    manifest = Bundle.load(heavy).manifest
    own = {"portable": manifest.memory["portable"], "cuda": {"unet_decoder": MemoryUse(1, 1)}}
    manifest = type(manifest)(**{**vars(manifest), "variants": {v: manifest.variants["portable"] for v in own},
                                 "memory": own})  # fmt: skip
    budget = Budget(manifest, "cuda", CPU)
    free(int((10 * 4 + 10 * 16) / memory.USABLE))
    assert budget.fits("unet_decoder", 10, 4) and not budget.fits("unet_decoder", 11, 4)
    assert not budget.fits("vae_decoder", 10, 4) and budget.fits("text_encoder", 10, 4)


def test_memory_that_a_graph_keeps_is_not_needed_again(heavy, free):
    manifest = Bundle.load(heavy).manifest
    free(0)
    budget = Budget(manifest, "portable", CPU)
    with budget.run("unet_decoder", 4, 100, keeps=lambda: True):
        pass
    assert [budget.fits("unet_decoder", rows, 100) for rows in (3, 4, 5)] == [True, True, False]
    assert not budget.fits("vae_decoder", 1, 1)
    with pytest.raises(OutOfMemoryError), budget.run("unet_decoder", 4, 100, keeps=lambda: True):
        raise OutOfMemoryError
    assert not budget.fits("unet_decoder", 1, 100)


@pytest.mark.parametrize("name", ["unet_decoder", "vae_decoder"])
def test_after_a_shortage_the_cpu_keeps_nothing(heavy, monkeypatch, free, name):
    pipe = Pipeline.load(heavy, device="cpu")
    graph = {"unet_decoder": pipe.graphs.unet_decoder, "vae_decoder": pipe.graphs.vae_decoder}[name]
    session, first = graph.session(), iter([True])
    run = session.run_with_iobinding

    def fail_once(*args):
        if next(first, False):
            raise RuntimeError("std::bad_alloc")
        run(*args)

    monkeypatch.setattr(session, "run_with_iobinding", fail_once)
    free(None)
    with pytest.warns(UserWarning, match=f"{name} ran out of memory on cpu"):
        pipe(HEART, seed=1, num_images=2, height=32, width=32, memory="parallel")
    free(0)
    held = {graph: pipe.graphs.budget.fits(graph, 1, 1) for graph in ("unet_decoder", "vae_decoder")}
    assert held == {"unet_decoder": name != "unet_decoder", "vae_decoder": name != "vae_decoder"}


def test_pictures_are_decoded_one_at_a_time_then_in_tiles(heavy_pipe, monkeypatch, close, free):
    size = {"num_images": 2, "seed": 1, "height": 256, "width": 320, "memory": "sequential", "output_type": "np"}
    free(None)
    whole = heavy_pipe(HEART, **size)
    assert whole.tile is None
    latents = 128 * 160
    graph = Scarce(heavy_pipe.graphs.vae_decoder, most=1)
    monkeypatch.setattr(heavy_pipe.graphs, "vae_decoder", graph)
    with pytest.warns(UserWarning, match="^vae_decoder ran out of memory on cpu: decoding 1 at once$") as caught:
        result = heavy_pipe(HEART, **size)
    np.testing.assert_array_equal(result.images, whole.images)
    assert (result.tile, rows_of(graph), len(caught)) == (None, [2, 1, 1], 1)

    graph = Scarce(heavy_pipe.graphs.vae_decoder, latents=latents - 1)
    monkeypatch.setattr(heavy_pipe.graphs, "vae_decoder", graph)
    with pytest.warns(UserWarning) as caught:
        result = heavy_pipe(HEART, **size)
    close(result.images, whole.images)
    assert result.tile == (128, 128) and set(graph.seen[2:]) == {(1, 64, 64)}
    assert [str(w.message).partition("decoding ")[2] for w in caught] == [
        "1 at once",
        "in tiles of 128x128 pixels, which changes the picture",
    ]
    assert caught[1].filename == __file__

    graph = Scarce(heavy_pipe.graphs.vae_decoder, latents=32 * 32)
    monkeypatch.setattr(heavy_pipe.graphs, "vae_decoder", graph)
    with pytest.warns(UserWarning, match="tiles of 64x64"):
        result = heavy_pipe(HEART, vae_tiling=True, **size)
    close(result.images, whole.images)
    assert result.tile == (64, 64) and graph.seen[:2] == [(1, 64, 64), (1, 32, 32)]


def test_the_estimate_decides_how_pictures_are_decoded(heavy, close, free):
    pipe = Pipeline.load(heavy, device="cpu")
    size = {"num_images": 2, "seed": 1, "height": 160, "width": 128, "memory": "sequential", "output_type": "np"}
    picture = 80 * 64 * pipe.bundle.manifest.memory["portable"]["vae_decoder"].per_latent / memory.USABLE
    graph = pipe.graphs.vae_decoder = Scarce(pipe.graphs.vae_decoder)
    free(int(0.9 * picture))
    with pytest.warns(UserWarning, match="would run out of memory on cpu, by the bundle's estimate: decoding in tiles"):
        tiled = pipe(HEART, **size)
    assert tiled.tile == (128, 128)
    graph.seen.clear()
    free(int(picture))  # The graph also keeps the memory of the tile.
    result = pipe(HEART, **size)
    assert (result.tile, rows_of(graph)) == (None, [1, 1])
    close(tiled.images, result.images)
    graph.seen.clear()
    free(int(1.1 * picture))
    np.testing.assert_array_equal(pipe(HEART, **size).images, result.images)
    assert rows_of(graph) == [2]


def test_concurrent_requests_do_not_rely_on_kept_memory(heavy, free):
    pipe = Pipeline.load(heavy, device="cpu")
    budget, run = pipe.graphs.budget, ("unet_decoder", 1, 256)
    free(None)
    pipe(HEART, seed=1, height=32, width=32, memory="sequential", output_type="latent")
    free(0)
    with budget.request():
        assert budget.fits(*run)
        with budget.request():
            assert not budget.fits(*run)
    budget.freed("unet_decoder")
    assert not budget.fits(*run)


def test_memory_that_the_decoder_keeps_does_not_cause_tiles(heavy, free):
    """At its last step, the decoder gives back memory that the image decoder needs."""
    pipe = Pipeline.load(heavy, device="cpu")
    size = {"height": 160, "width": 128, "memory": "parallel", "output_type": "np"}
    uses = pipe.bundle.manifest.memory["portable"]
    decoder = uses["unet_decoder"].bytes(4, 80 * 64) / memory.USABLE
    image = uses["vae_decoder"].bytes(1, 80 * 64) / memory.USABLE
    asked = []
    pipe.graphs.unet_decoder = Watched(pipe.graphs.unet_decoder, asked)

    def gives_back(bytes_free):
        asked.clear()
        free(int(bytes_free))
        pipe(HEART, seed=1, **size)
        return any(asked)

    assert not gives_back(1.01 * (decoder + image))
    assert not gives_back(1.01 * image)  # The memory of the first picture is kept for this one.
    pipe.graphs.budget.freed("unet_decoder")
    pipe.graphs.budget.freed("vae_decoder")
    assert gives_back(1.01 * image)


class Watched:
    """A graph that records whether it must give back its memory."""

    def __init__(self, graph, asked):
        self._graph, self._asked = graph, asked

    def __call__(self, *args, release=False, **options):
        self._asked.append(release)
        return self._graph(*args, release=release, **options)

    def __getattr__(self, name):
        return getattr(self._graph, name)


def test_tiling_can_be_requested_and_refused(heavy_pipe, monkeypatch, free, close):
    size = {"seed": 1, "height": 160, "width": 128, "memory": "sequential", "output_type": "np"}
    free(None)
    tiled = heavy_pipe(HEART, vae_tiling=True, **size)
    assert tiled.tile == (128, 128)
    close(tiled.images, heavy_pipe(HEART, vae_tiling=False, **size).images)
    assert heavy_pipe(HEART, vae_tiling=True, **{**size, "height": 128}).tile is None
    monkeypatch.setattr(heavy_pipe.graphs, "vae_decoder", Scarce(heavy_pipe.graphs.vae_decoder, latents=0))
    with pytest.raises(OutOfMemoryError, match=r'^vae_decoder ran out.*, allow `vae_tiling`, load with vae="tiny"$'):
        heavy_pipe(HEART, vae_tiling=False, **size)


def test_the_image_decoder_is_chosen_at_load(heavy, heavy_pipe, close):
    tiny = Pipeline.load(heavy, device="cpu", vae="tiny")
    assert (tiny.vae, heavy_pipe.vae) == ("tiny", "kl")
    size = {"seed": 1, "height": 8, "width": 8, "output_type": "np"}
    full, half = heavy_pipe(HEART, **size), tiny(HEART, **size)
    assert (full.vae, half.vae) == ("kl", "tiny")
    inside = (full.images > 0) & (full.images < 1)  # Other pixels are clipped.
    close((half.images - 0.5)[inside], ((full.images - 0.5) / 2)[inside])
    assert inside.any()


SHORT = '''
import json, os, resource, sys, warnings
from pathlib import Path
import numpy as np
import onnxruntime
from tiue_runtime import Pipeline
from tiue_runtime.budget import Budget
from tiue_runtime.ort.graph import Graph

directory, stage, mib, memory = sys.argv[1:]
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # Several threads would reserve address space at random times.
Budget.fits = lambda *_, **__: True  # Ignore the estimate, so that memory runs out.

class Options(onnxruntime.SessionOptions):
    """Without the arena, whose growth depends on the memory that is left: the limits below would depend on luck."""

    def __init__(self):
        super().__init__()
        self.enable_cpu_mem_arena = False

onnxruntime.SessionOptions = Options
pipe = Pipeline.load(directory, device="cpu")
z = np.random.default_rng(0).standard_normal((1, 4, 256, 256)).astype(np.float32)
run_graph = Graph.__call__

def limited_from_stage_on(graph, *arguments, **options):
    if graph.name == stage and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        status = Path("/proc/self/status").read_text().split()
        size = 1024 * int(status[status.index("VmSize:") + 1])
        resource.setrlimit(resource.RLIMIT_AS, (size + int(mib) * 2**20, resource.RLIM_INFINITY))
    return run_graph(graph, *arguments, **options)

Graph.__call__ = limited_from_stage_on
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    warnings.filterwarnings("ignore", "width, height")
    result = pipe("a red heart", latents=z, memory=memory, output_type="np")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
Graph.__call__ = run_graph
whole = pipe("a red heart", latents=z, memory="sequential", output_type="np")
difference = float(np.abs(result.images - whole.images).max())
print(json.dumps([result.memory, result.tile, whole.tile, difference, [str(w.message) for w in caught]]))
'''


def short_of_memory(directory, stage, mib, mode):
    """Make a picture of 512x512 in a process that may take only `mib` MiB more memory from `stage` on."""
    command = [sys.executable, "-c", SHORT, str(directory), stage, str(mib), mode]
    alone = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
    return json.loads(done.stdout)


@linux
@pytest.mark.parametrize("mib, expected", [(105, "sequential"), (200, "partial")])
def test_a_real_shortage_in_the_decoder(heavy, mib, expected):
    # A timestep needs 64 MiB.
    mode, _, _, difference, said = short_of_memory(heavy, "unet_decoder", mib, "parallel")
    assert mode == expected
    assert difference < ORDER_OF_SUMS
    modes = ["parallel", "partial", "sequential"]
    assert said[: modes.index(expected)] == [
        f"unet_decoder ran out of memory on cpu in {high} mode: continuing in {low} mode"
        for high, low in list(pairwise(modes))[: modes.index(expected)]
    ]


@linux
def test_a_real_shortage_in_the_image_decoder(heavy):
    # The whole picture needs 192 MiB. A tile of 128 pixels needs a 16th of it.
    mode, tile, whole, difference, said = short_of_memory(heavy, "vae_decoder", 120, "parallel")
    assert (mode, tile, whole) == ("parallel", [128, 128], None)
    assert difference < ORDER_OF_SUMS
    assert said == [
        "vae_decoder ran out of memory on cpu: decoding in tiles of 128x128 pixels, which changes the picture"
    ]


def test_no_layout_of_memory_is_kept_from_a_larger_run(heavy_pipe):
    # With a kept layout, a single timestep after 4 parallel ones takes the memory of 4 (ONNX Runtime 1.32).
    for graph in (heavy_pipe.graphs.unet_decoder, heavy_pipe.graphs.vae_decoder):
        assert not graph.session().get_session_options().enable_mem_pattern


@pytest.mark.parametrize(
    "said",
    [
        "std::bad_alloc",
        "bad allocation",
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node.\n"
        "bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t) Failed to allocate memory for "
        "requested buffer of size 939524096",
        "Available memory of 1024 is smaller than requested bytes of 4096",
        "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN failure 2: CUDNN_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN failure 5003: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0",
    ],
)
def test_messages_of_exhausted_memory(said):
    assert is_out_of_memory(RuntimeError(said))


def test_other_errors_are_not_exhausted_memory():
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("Got invalid dimensions for input: latents"))
    assert not is_out_of_memory(InferenceError("unet_decoder failed on cuda: CUDA failure 700"))


def test_memory_of_this_process():
    found = free_memory()
    assert found > 2**20 if sys.platform == "linux" else found is None or found > 2**20


@linux
def test_the_limit_of_the_address_space_counts():
    code = (
        "import resource; from tiue_runtime.host.memory import free_memory; "
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); print(free_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 2**30


@linux
@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("0::/", {}, 8000),
        ("0::/app/job", {"app/job/memory": ("max", 100, ""), "app/memory": ("5000", 3000, "anon 1\n")}, 2000),
        ("0::/app", {"app/memory": ("5000", 3000, "inactive_file 500\ninactive_anon 7\n")}, 2500),
        ("0::/app", {"app/memory": ("5000", 6000, "")}, 0),
        ("5:cpu:/\n4:memory:/host/path", {"memory/memory": ("4000", 3000, "total_inactive_file 200\n")}, 1200),
        ("4:cpu,memory:/a", {"memory/a/memory": ("9223372036854771712", 3000, "")}, 8000),
    ],
)
def test_limits_of_control_groups(tmp_path, groups, files, expected):
    for name, text in (("meminfo", "MemTotal: 20000 kB\nMemAvailable: 8000 kB\n"), ("self/cgroup", groups),
                       ("self/status", "VmSize: 1 kB\n")):  # fmt: skip
        path = tmp_path / "proc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    old = "memory:" in groups or "memory" in groups.partition("\n")[0]
    for stem, (limit, usage, pages) in files.items():
        path = tmp_path / "sys/fs/cgroup" / stem
        path.parent.mkdir(parents=True, exist_ok=True)
        scaled = limit if limit == "max" else str(1024 * int(limit) if len(limit) < 9 else int(limit))
        counted = "".join(
            f"{name} {1024 * int(number)}\n" for name, number in (line.split() for line in pages.splitlines())
        )
        names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
        for name, content in zip(names, (scaled, str(1024 * usage)), strict=True):
            path.with_name(f"memory.{name}").write_text(f"{content}\n")
        path.with_name("memory.stat").write_text(counted)
    assert host_memory.linux_free(tmp_path) == 1024 * expected


class Driver:
    """The used functions of the CUDA driver. `broken` names one that returns an error."""

    def __init__(self, broken=""):
        self.calls = []
        self._broken = broken

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            if name == "cuDeviceGet":
                assert arguments[1] == 1  # the requested index
            if name == "cuMemGetInfo_v2":
                for reference, value in zip(arguments, (3 * 2**30, 8 * 2**30), strict=True):
                    ctypes.cast(reference, ctypes.POINTER(ctypes.c_size_t)).contents.value = value
            return int(name == self._broken)

        return call


def test_memory_of_a_gpu():
    driver = Driver()
    assert host_memory.cuda_free(1, lambda _: driver) == 3 * 2**30
    assert driver.calls[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]


@pytest.mark.parametrize("broken", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2",
                                    "cuMemGetInfo_v2"])  # fmt: skip
def test_memory_of_a_gpu_is_unknown_when_the_driver_fails(broken):
    driver = Driver(broken)
    assert host_memory.cuda_free(1, lambda _: driver) is None
    retained = "cuDevicePrimaryCtxRetain" in driver.calls and broken != "cuDevicePrimaryCtxRetain"
    assert ("cuDevicePrimaryCtxRelease_v2" in driver.calls) == retained
    assert ("cuCtxPopCurrent_v2" in driver.calls) == (broken == "cuMemGetInfo_v2")


def test_memory_of_a_gpu_without_a_driver():
    def load(name):
        raise OSError(name)

    assert host_memory.cuda_free(0, load) is None
    assert host_memory.cuda_free(0, lambda _: object()) is None


def loaded(pipe):
    return [graph.name for graph in pipe.graphs if graph.loaded]


@pytest.fixture
def low_pipe(tiny):
    return Pipeline.load(tiny, device="cpu", memory="low")


def test_low_memory_holds_one_graph_at_a_time(low_pipe, pipe, monkeypatch):
    held = []
    create = graph_module.create_session
    monkeypatch.setattr(
        graph_module, "create_session", lambda *args: held.append(loaded(low_pipe)) or create(*args)
    )  # fmt: skip
    assert loaded(low_pipe) == []
    result = low_pipe(HEART, seed=1, num_images=2, output_type="np")
    assert held == [[]] * 4  # No other graph was loaded with any of them.
    assert loaded(low_pipe) == []
    assert result.memory == "sequential"
    expected = pipe(HEART, seed=1, num_images=2, output_type="np", memory="sequential").images
    np.testing.assert_array_equal(result.images, expected)


@pytest.mark.parametrize("request_of", [{"prompt": HEART}, {"prompt_embeds": np.zeros((1, 8, 3), np.float32)}])
def test_low_memory_for_one_request(tiny, monkeypatch, request_of):
    """Graphs that are already loaded are also freed before their turn."""
    pipe = Pipeline.load(tiny, device="cpu")
    held, graphs = [], tuple(pipe.graphs)
    run = Graph.__call__

    def run_and_note(*args, **options):
        outputs = run(*args, **options)
        held.append(loaded(pipe))
        return outputs

    monkeypatch.setattr(Graph, "__call__", run_and_note)
    pipe(**request_of, seed=1, steps=2, memory="low")
    order = [graph.name for graph in graphs if "prompt" in request_of or graph is not pipe.graphs.text_encoder]
    assert held == [[name] for name in order for _ in range(2 if name == "unet_decoder" else 1)]
    assert loaded(pipe) == []


def test_free_memory_is_looked_up_with_all_graphs_loaded(heavy, monkeypatch):
    pipe, seen = Pipeline.load(heavy, device="cpu", memory="low"), []
    monkeypatch.setattr(memory, "free_memory", lambda device: seen.append(len(loaded(pipe))))
    pipe(HEART, seed=1, height=8, width=8, memory="auto")
    assert set(seen) == {4}


def test_low_memory_with_embeddings_of_the_wrong_width(low_pipe):
    """Only a graph knows the width, so one is loaded to read it."""
    with pytest.raises(RequestError, match="prompt_embeds"):
        low_pipe(prompt_embeds=np.zeros((1, 8, 4), np.float32))
    assert loaded(low_pipe) == []


def test_low_memory_finds_a_bad_graph_when_its_turn_comes(edit):
    def mistake(content):
        content["variants"]["portable"]["unet_decoder"] = "vae_decoder.onnx"

    pipe = Pipeline.load(edit(mistake), device="cpu", memory="low")
    with pytest.raises(BundleError, match="vae_decoder: expected contribution"):
        pipe(HEART)
    assert loaded(pipe) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("Exception during initialization: std::bad_alloc")])
def test_running_out_of_memory_while_loading(heavy, monkeypatch, error):
    start, missing = sessions.start_session, ["unet_decoder"]

    def start_or_fail(model, device, settings):
        if any(name in str(model) for name in missing):
            raise error
        return start(model, device, settings)

    monkeypatch.setattr(sessions, "start_session", start_or_fail)
    message = "^{} ran out of memory while it was loaded on cpu: {}"
    expected = message.format("unet_decoder", 'load with memory="low", load with vae="tiny"$')
    with pytest.raises(OutOfMemoryError, match=expected):
        Pipeline.load(heavy, device="cpu")
    pipe = Pipeline.load(heavy, device="cpu", memory="low")
    expected = message.format("unet_decoder", 'make smaller pictures, fewer at once, load with vae="tiny"$')
    with pytest.raises(OutOfMemoryError, match=expected):
        pipe(HEART, height=8, width=8)
    missing[:] = ["vae_decoder"]
    with pytest.raises(OutOfMemoryError, match=message.format("vae_decoder", "make")):
        pipe(HEART, height=256, width=320)  # no warning of tiles, which would not help
    assert loaded(pipe) == []


def test_recordings_and_low_memory_exclude_each_other(tiny):
    with pytest.raises(RequestError, match="cuda_graphs"):
        Pipeline(Bundle.load(tiny), Placement(Device("cuda"), "portable", Settings(cuda_graphs=True)), memory="low")


def test_the_memory_mode_is_checked_at_load(tiny):
    with pytest.raises(RequestError, match=r"memory: expected one of auto, low, .*, got 'Low'"):
        Pipeline.load(tiny, device="cpu", memory="Low")
