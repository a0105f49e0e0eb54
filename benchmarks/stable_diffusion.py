"""`python -m benchmarks.stable_diffusion --model sd21-base`: TiUE against a loop of full UNet passes.

Same UNet (random weights), same noise, same DDIM timesteps, no guidance, same threads, which do not spin when idle (in
contender optimum-spinning they do, as by default). Ours is an exported bundle run by tiue_runtime; the peer is
optimum's ORTStableDiffusionPipeline on the CPU, diffusers in float16 on CUDA. Every contender runs in a process of its
own. They take turns run by run; with --apart, process by process, for when memory does not hold all. Before anything
is timed, their first noise predictions are compared: they must be one network's.

Everything needed is made once in --work: MODEL (the pipeline), MODEL-optimum, MODEL-bundle. Random weights make noise,
but cost what trained ones cost.

Not run so far: anything with --device cuda. There --contenders defaults to both variants of the graphs, with and
without CUDA graphs, against diffusers, at batch 1 and 4; the GPU must have nothing else to do, or "GPU GiB" is wrong.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tiue_runtime.bundle import TINY, Bundle
from tiue_runtime.sessions import thread_count

from .comparing import ROOT, BenchmarkError, Conditions, Entry, compare, table
from .machine import cpu_name, gpu_query
from .pipelines import LAYOUTS

# Name -> kind, and options of `contender.Tiue` or `peers.optimum`.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiue": ("tiue", {}),
    "tiue-sequential": ("tiue", {"memory": "sequential"}),
    "tiue-taesd": ("tiue", {"vae": "tiny"}),
    "tiue-portable": ("tiue", {"variant": "portable"}),
    "tiue-portable-graphs": ("tiue", {"variant": "portable", "cuda_graphs": True}),
    "tiue-cuda": ("tiue", {"variant": "cuda"}),
    "tiue-cuda-graphs": ("tiue", {"variant": "cuda", "cuda_graphs": True}),
    "optimum": ("optimum", {}),
    "optimum-spinning": ("optimum", {"spinning": True}),
    "diffusers": ("diffusers", {}),
}
_ON_CPU = ("tiue", "optimum")
_ON_CUDA = ("tiue-portable", "tiue-portable-graphs", "tiue-cuda", "tiue-cuda-graphs", "diffusers")
_PACKAGES = ("tiue-runtime", "onnxruntime", "onnxruntime-gpu", "optimum-onnx", "diffusers", "transformers", "torch")


def make_ready(
    model: str, work: Path, bundle: Path | None, kinds: Iterable[str], device: str = "cpu"
) -> dict[str, Path]:
    """Make what is not there yet, each in a process of its own, so that its memory is free again.

    The bundle is float32, and for CUDA float16 with both variants of the graphs.
    Returns, by kind of contender, the directory it loads. Raises BenchmarkError.
    """
    pipeline, onnx = work / model, work / f"{model}-optimum"
    ours = bundle or work / (f"{model}-bundle" if device == "cpu" else f"{model}-bundle-{device}")
    flags = [] if device == "cpu" else ["--target", "portable,cuda", "--precision", "fp16"]
    directories = {"diffusers": pipeline, "optimum": onnx, "tiue": ours}
    commands: dict[Path, list[object]] = {
        pipeline: ["benchmarks.pipelines", model, pipeline],
        onnx: ["benchmarks.peers", pipeline, onnx],
        ours: ["export.onnx", "--ckpt", pipeline, "--out", ours, *flags],
    }
    for directory in dict.fromkeys((pipeline, *(directories[kind] for kind in kinds))):
        if directory == bundle or directory.exists():
            continue
        _progress(f"making {directory}")
        command = [sys.executable, "-m", *map(str, commands[directory])]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # optimum asks the hub about local directories, too
        done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True)
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command[1:])}: {' '.join(done.stderr.splitlines()[-1:])}")
        _progress(done.stdout.splitlines()[-1])
    return directories


def surroundings(conditions: Conditions) -> dict[str, str]:
    """Machine, threads, versions and date."""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # of the two wheels of ONNX Runtime there is one
            continue
    height, width = (conditions.pixels_per_latent * size for size in conditions.shape[1:])
    gpu = {} if conditions.device == "cpu" else {"gpu": gpu_query("name,driver_version")}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{cpu_name()}, {conditions.threads} threads",
        **gpu,
        "versions": f"python {platform.python_version()}, {', '.join(versions)}",
        "picture": f"{width}x{height}, {conditions.steps} DDIM timesteps, no guidance; {conditions.runs} timed runs",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0, or 2 after one line on stderr."""
    arguments = _parser().parse_args(argv)
    on_cpu = arguments.device == "cpu"
    names = arguments.contenders or (_ON_CPU if on_cpu else _ON_CUDA)
    kinds = [CONTENDERS[name][0] for name in names]
    try:
        if not on_cpu:
            _check_gpu(kinds)
        directories = make_ready(
            arguments.model, arguments.work.absolute(), arguments.bundle, ["tiue", *kinds], arguments.device
        )
        manifest = Bundle.load(directories["tiue"]).manifest
        if on_cpu and not arguments.contenders and TINY in manifest.vaes:
            names = (*names, "tiue-taesd")
        size = arguments.size or manifest.default_height
        if size % manifest.size_multiple:
            raise BenchmarkError(f"--size: expected a multiple of {manifest.size_multiple}, got {size}")
        side = size // manifest.pixels_per_latent
        conditions = Conditions(
            device=arguments.device,
            threads=arguments.threads,
            shape=(manifest.latent_channels, side, side),
            pixels_per_latent=manifest.pixels_per_latent,
            steps=arguments.steps,
            batches=tuple(arguments.batches or ([1] if on_cpu else [1, 4])),
            runs=arguments.runs,
        )
        about = {"model": f"{arguments.model}, random weights", **surroundings(conditions)}
        entries = {
            name: Entry(CONTENDERS[name][0], directories[CONTENDERS[name][0]], CONTENDERS[name][1]) for name in names
        }
        measured = compare(entries, conditions, apart=arguments.apart, progress=_progress)
    except (BenchmarkError, ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks.stable_diffusion: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(f"{key:<10}{value}" for key, value in about.items()))
    print(table(measured))
    if arguments.json:
        report = about | {"contenders": {name: asdict(m) for name, m in measured.items()}}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _check_gpu(kinds: Sequence[str]) -> None:
    """Before anything is made: is there a GPU, and will all contenders be on it?"""
    gpu_query("name")
    if "optimum" in kinds:
        raise BenchmarkError("--contenders optimum: it is measured on the CPU only; on cuda the peer is diffusers")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stable_diffusion",
        description="Time and memory of a TiUE bundle beside a pipeline that runs the same UNet in full at every step.",
    )
    parser.add_argument("--model", choices=LAYOUTS, default="sd21-base")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="where things are made, once")
    parser.add_argument("--bundle", type=Path, help="a bundle exported from WORK/MODEL (default: WORK/MODEL-bundle)")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, help="the first is what others are compared with"
    )
    parser.add_argument("--size", type=int, help="pixels, height and width (default: the model's)")
    parser.add_argument("--steps", type=int, default=4, help="a step count of the bundle")
    parser.add_argument("--batches", type=int, nargs="+", help="pictures per request (default: 1; on cuda 1 and 4)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs, after the first picture")
    parser.add_argument("--threads", type=int, default=thread_count(), help="CPU threads (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the first GPU")
    parser.add_argument("--apart", action="store_true", help="never two contenders in memory at once")
    parser.add_argument("--json", type=Path, help="also write every measurement there")
    return parser


def _progress(message: str) -> None:
    print(f"{message} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
