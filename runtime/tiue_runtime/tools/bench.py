"""Seconds per image, graph by graph, with the conditions they were measured under."""

import platform
import statistics
import time
from pathlib import Path

import numpy as np

from tiue_runtime import __version__
from tiue_runtime.errors import InferenceError, RequestError
from tiue_runtime.host.machine import thread_count
from tiue_runtime.ort.devices import Precision
from tiue_runtime.ort.sessions import installed_wheels
from tiue_runtime.pipeline import Options, Pipeline, Vae
from tiue_runtime.request import Memory

PROMPT = "a red heart"


def bench(
    bundle: str | None,
    device: str,
    *,
    runs: int,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    memory: Memory = "auto",
    vae: Vae | None = None,
    vae_tiling: bool | None = None,
    variant: str | None = None,
    cuda_graphs: bool = False,
    precision: Precision | None = None,
) -> dict[str, object]:
    """Time `runs` pictures after one untimed, whose pixels every timed one must repeat.

    Returns rows to print: conditions, then median, least and most milliseconds of each graph.
    Raises RequestError, InferenceError and what `Pipeline.load` raises.
    """
    if runs < 1:
        raise RequestError(f"runs: expected at least 1, got {runs}")
    start = time.perf_counter()
    pipeline = Pipeline.load(
        bundle,
        device=device,
        vae=vae,
        variant=variant,
        cuda_graphs=cuda_graphs,
        precision=precision,
        memory=memory,
    )
    loading = time.perf_counter() - start

    options = Options(seed=0, steps=steps, height=height, width=width, memory=memory, vae_tiling=vae_tiling)
    if pipeline.cuda_graphs:
        pipeline.warmup(steps=steps, height=height, width=width, memory=memory, vae_tiling=vae_tiling)

    def run():
        return pipeline(PROMPT, output_type="np", **options)

    warm_up = run()
    results = [run() for _ in range(runs)]
    # The same request on the same device; GPU kernels may add up in another order from run to run.
    if not all(np.allclose(result.images, warm_up.images, atol=0.02) for result in results):
        raise InferenceError("the same seed gave different pictures from run to run")
    _, rows, columns, _ = warm_up.images.shape
    computed = f" in {pipeline.precision}" if pipeline.precision else ""
    recorded = ", recorded" if pipeline.cuda_graphs else ""
    tiles = ", tiles of {1}x{0}".format(*warm_up.tile) if warm_up.tile else ""
    wheels = ", ".join(f"{name} {number}" for name, number in installed_wheels().items())
    report: dict[str, object] = {
        "bundle": f"{pipeline.bundle.manifest.name}, {pipeline.bundle.manifest.precision}",
        "image": f"{columns}x{rows}, batch 1, {warm_up.steps} steps, {warm_up.memory}, vae {warm_up.vae}{tiles}",
        "device": f"{pipeline.device}{computed}, {pipeline.variant} graphs{recorded}",
        "cpu": f"{_cpu_name()}, {thread_count()} threads",
        "versions": f"tiue-runtime {__version__}, {wheels}, python {platform.python_version()}",
        "loading": f"{loading:.2f} s",
        "warm-up": f"{1e3 * warm_up.timings['total']:.1f} ms, not counted below",
        "runs": f"{runs}; milliseconds: median (least .. most)",
    }
    for graph in warm_up.timings:
        times = [1e3 * result.timings[graph] for result in results]
        report[graph] = f"{statistics.median(times):.1f} ({min(times):.1f} .. {max(times):.1f})"
    return report


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows the name
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
