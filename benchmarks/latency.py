"""`python -m benchmarks.latency --model sd21-base --size 512`: TiUE beside other programs that run the same UNet.

UNet, noise, timesteps and number of threads are the same for all contenders, and there is no guidance. A contender is
KIND or KIND:option=value,option=value. All kinds take device= (default: --device).

- tiue: a bundle through tiue_runtime. bundle=fp32|fp16|int8, or a name given with --bundle; vae=kl|tiny;
  memory=parallel|sequential|low; variant=, precision=, cuda_graphs=true as in `Pipeline.load`.
- torch: the same algorithm in PyTorch, `tiue.unet.TiUE`, eager. compile=true runs it through torch.compile, which takes
  minutes at the first picture.
- diffusers: StableDiffusionPipeline. It runs the full UNet at every timestep, and so do the following.
- optimum: ORTStableDiffusionPipeline on ONNX Runtime. Its idle threads do not spin, as in tiue_runtime. spinning=true
  lets them spin, which is ONNX Runtime's default.
- openvino: OpenVINO by itself on optimum's graphs; precision=fp32|bf16.
- sdcpp: stable-diffusion.cpp; precision=fp32|fp16.

Every contender runs in a process of its own, by the interpreter that --python names. Contenders take turns run by run.
With --apart, only one process exists at a time, for models of which memory cannot hold several.

Outputs are compared before anything is timed. The first noise predictions must be those of one network. Latents and
pictures must agree within an algorithm. A contender that cannot run is left out with the reason. A contender whose
output is wrong is not timed, and the command fails.

All files are made once in --work, and used again: MODEL (the pipeline), MODEL-optimum, MODEL-bundle-fp32 (with -tiny if
it has a tiny VAE). Random weights make noise, but cost the same as trained ones. emoji is the 64-pixel student, with
its trained weights.

Nothing has run on a GPU so far. There, no other program may use the GPU, or "GPU, GiB" is wrong.
"""

import argparse
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tiue_runtime.host.machine import thread_count

from benchmarks.agreement import BenchmarkError
from benchmarks.comparing import CannotRun, Comparison, Conditions, Entry, Measured, compare
from benchmarks.kinds import KINDS, Spec, Workplace
from benchmarks.machine import GPUS, cpu_name, gpu_query
from benchmarks.pipelines import LAYOUTS, PIPELINES
from benchmarks.report import save, table

_ON_CPU = (
    "tiue tiue:variant=portable tiue:memory=sequential tiue:memory=low tiue:vae=tiny tiue:device=openvino "
    "torch torch:compile=true diffusers optimum openvino openvino:precision=bf16 sdcpp"
)
ON_CUDA = (
    "tiue:variant=portable tiue:variant=portable,cuda_graphs=true tiue:variant=cuda tiue:variant=cuda,cuda_graphs=true "
    "torch diffusers"
)
# The distributions that are printed. The JSON has all distributions of each contender.
_NAMED = ("python", "tiue-runtime", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "openvino")
_NAMED += ("optimum-onnx", "torch", "diffusers", "transformers", "stable-diffusion-cpp-python")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 if outputs disagree; 2 if nothing could be measured. A failure prints the reason in one line.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (BenchmarkError, ValueError, OSError, subprocess.CalledProcessError) as error:
        return _fail(error, 2)


def _run(arguments: argparse.Namespace) -> int:
    on_gpu = arguments.device != "cpu"
    asked = " ".join(arguments.contenders or [ON_CUDA if on_gpu else _ON_CPU]).split()
    specs = [Spec.parse(text) for text in dict.fromkeys(asked)]
    place = workplace(arguments, arguments.device)
    shape, pixels = place.geometry(arguments.size)
    batches = tuple(arguments.batches or ([1, 4] if on_gpu else [1]))
    conditions = Conditions(arguments.threads, shape, pixels, arguments.steps, batches, arguments.runs)
    entries, skipped = prepare(place, specs, conditions)
    weights = "random" if arguments.model in LAYOUTS else "trained"

    def about(done: Comparison) -> dict[str, str]:
        return {"model": f"{arguments.model}, {weights} weights", **surroundings(conditions, done.measured)}

    def left_out(done: Comparison) -> dict[str, str]:
        return skipped | done.skipped | {name: f"WRONG: {why}" for name, why in done.wrong.items()}

    def save_so_far(done: Comparison) -> None:
        if arguments.out and done.measured:
            save(arguments.out, about(done), done.measured, left_out(done))

    done = compare(entries, conditions, apart=arguments.apart, progress=progress, after_round=save_so_far)
    if not done.measured:
        reasons = [*done.wrong.values(), *(f"{name}: {why}" for name, why in (skipped | done.skipped).items())]
        return _fail("; ".join(reasons), 1 if done.wrong else 2)
    print("\n".join(f"{key:<10}{value}" for key, value in about(done).items()))
    print(table(done.measured, left_out(done)))
    return _fail("; ".join(done.wrong.values()), 1) if done.wrong else 0


def prepare(place: Workplace, specs: Sequence[Spec], conditions: Conditions) -> tuple[dict[str, Entry], dict[str, str]]:
    """Make the files that contenders load.

    Returns:
        The contenders that can start, and the reasons of the others, both by name.
    """
    tiny = any(spec.options.get("vae") == "tiny" for spec in specs)
    entries, skipped = dict[str, Entry](), dict[str, str]()
    for spec in specs:
        try:
            entries[spec.name] = place.entry(spec, conditions, tiny=tiny)
        except CannotRun as reason:
            skipped[spec.name] = " ".join(str(reason).split())
            progress(f"{spec.name} is left out: {reason}")
    return entries, skipped


def surroundings(conditions: Conditions, measured: Mapping[str, Measured]) -> dict[str, str]:
    """Return the conditions of a measurement: machine, threads, versions and date."""
    versions = {
        f"{name} {number}"
        for m in measured.values()
        for name, number in {"python": m.installed.python, **m.installed.versions}.items()
        if name in _NAMED
    }
    height, width = conditions.size
    on_gpu = any(m.device.startswith(GPUS) for m in measured.values())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{cpu_name()}, {conditions.threads} thread{'s' * (conditions.threads > 1)}",
        **({"gpu": gpu_query("name,driver_version")} if on_gpu else {}),
        "system": platform.platform(terse=True),
        "versions": ", ".join(sorted(versions)),
        "picture": f"{width}x{height}, {conditions.steps} DDIM timesteps, no guidance",
        "rounds": str(max(len(seconds) for m in measured.values() for seconds in m.seconds.values())),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description="Measure time and memory of a TiUE bundle beside other programs that run the same UNet.",
    )
    parser.add_argument("--model", choices=PIPELINES, default="sd21-base", help="tiny takes seconds")
    parser.add_argument("--size", type=positive, help="pixels, height and width (default: the model's)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="KIND[:OPTION=VALUE,...]",
        help=f"contenders of the kinds {', '.join(KINDS)} (default on the CPU: {_ON_CPU}; on cuda: {ON_CUDA})",
    )
    add_places(parser)
    parser.add_argument("--steps", type=positive, default=4, help="timesteps (default: 4)")
    parser.add_argument("--batches", type=positive, nargs="+", help="pictures per request (default: 1; on cuda: 1, 4)")
    parser.add_argument("--runs", type=positive, default=3, help="timed rounds, after a first one (default: 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of contenders that name none")
    parser.add_argument("--apart", action="store_true", help="keep only one contender in memory at a time")
    parser.add_argument(
        "--out", type=Path, metavar="PREFIX", help="also write PREFIX.json, .md and .png, after each round"
    )
    return parser


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the flags for directories, interpreters and threads."""
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks"), help="directory of all files that are made once"
    )
    parser.add_argument(
        "--bundle",
        action="append",
        type=_named,
        default=[],
        metavar="NAME=DIR",
        help="a bundle exported from WORK/MODEL, for bundle=NAME (default for fp32: WORK/MODEL-bundle-fp32)",
    )
    parser.add_argument(
        "--python",
        action="append",
        type=_named,
        default=[],
        metavar="NAME=PATH",
        help="the interpreter of a contender, or of all contenders of a kind (default: this one)",
    )
    parser.add_argument("--threads", type=positive, default=thread_count(), help="CPU threads (default: all)")


def positive(text: str) -> int:
    """Read a number of a flag. Raises ArgumentTypeError."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected an integer above 0, got {text!r}")
    return int(text)


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.rpartition("=")  # A contender's name may also contain "=".
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, path


def workplace(arguments: argparse.Namespace, device: str = "cpu") -> Workplace:
    """Make the Workplace that the flags of `add_places` describe."""
    bundles = {name: Path(path).absolute() for name, path in arguments.bundle}
    return Workplace(arguments.model, arguments.work.absolute(), bundles, dict(arguments.python), device, progress)


def progress(message: str) -> None:
    """Print a line of progress on stderr."""
    print(f"{message} ...", file=sys.stderr, flush=True)


def _fail(reason: object, status: int) -> int:
    print(f"benchmarks.latency: error: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
