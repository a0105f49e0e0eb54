"""Seconds per image, graph by graph, with the conditions of the measurement."""

import platform
import statistics
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiue_runtime import __version__
from tiue_runtime.errors import InferenceError, RequestError
from tiue_runtime.host.machine import thread_count
from tiue_runtime.options import LoadOptions, RequestOptions
from tiue_runtime.ort.sessions import installed_wheels
from tiue_runtime.pipeline import Pipeline
from tiue_runtime.result import Result

PROMPT = "a red heart"
SAME = 0.02  # of pixels in [0, 1]: GPU kernels may add up in another order from run to run


def bench(
    bundle: str | None = None, *, runs: int, loading: LoadOptions | None = None, request: RequestOptions | None = None
) -> dict[str, object]:
    """Time `runs` pictures after an untimed one. Every timed picture must equal the untimed one.

    Args:
        bundle: as in `Pipeline.load`.
        runs: at least 1.
        loading: options of `Pipeline.load`.
        request: options of every request.

    Returns:
        Rows to print: conditions, then the median, least and most milliseconds of each graph.

    Raises:
        RequestError: runs or an option is wrong.
        InferenceError: a run failed, or its pictures differ from the untimed run's.
        TiueError: as `Pipeline.load`.
    """
    if runs < 1:
        raise RequestError(f"runs: expected at least 1, got {runs}")
    options: RequestOptions = {"seed": 0, **(request or {})}
    begun = time.perf_counter()
    pipeline = Pipeline.load(bundle, memory=options.get("memory") or "auto", **(loading or {}))
    loaded = time.perf_counter() - begun
    if pipeline.cuda_graphs:
        pipeline.warmup(**options)

    def run() -> Result[NDArray[np.float32]]:
        return pipeline(PROMPT, output_type="np", **options)

    warm_up = run()
    results = [run() for _ in range(runs)]
    if not all(np.allclose(result.images, warm_up.images, atol=SAME) for result in results):
        raise InferenceError("the same seed gave different pictures from run to run")
    count, rows, columns, _ = warm_up.images.shape
    computed = f" in {pipeline.precision}" if pipeline.precision else ""
    recorded = ", recorded" if pipeline.cuda_graphs else ""
    tiles = ", tiles of {1}x{0}".format(*warm_up.tile) if warm_up.tile else ""
    wheels = ", ".join(f"{name} {number}" for name, number in installed_wheels().items())
    manifest = pipeline.bundle.manifest
    report: dict[str, object] = {
        "bundle": f"{manifest.name}, {manifest.precision}, weights in {manifest.weights}",
        "image": f"{columns}x{rows}, batch {count}, {warm_up.steps} steps, {warm_up.memory}, vae {warm_up.vae}{tiles}",
        "device": f"{pipeline.device}{computed}, {pipeline.variant} graphs{recorded}",
        "cpu": f"{_cpu_name()}, {thread_count()} threads",
        "versions": f"tiue-runtime {__version__}, {wheels}, python {platform.python_version()}",
        "loading": f"{loaded:.2f} s",
        "warm-up": f"{1e3 * warm_up.timings['total']:.1f} ms, not counted below",
        "runs": f"{runs}; milliseconds: median (least .. most)",
    }
    for graph in warm_up.timings:
        times = [1e3 * result.timings[graph] for result in results]
        report[graph] = f"{statistics.median(times):.1f} ({min(times):.1f} .. {max(times):.1f})"
    return report


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # It exists on Linux. Elsewhere, `platform` knows the name.
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
