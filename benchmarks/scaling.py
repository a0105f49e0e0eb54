"""`python -m benchmarks.scaling --model sd21-base --out docs/scaling`: the cost by batch, timesteps and resolution.

Three series go through one point: batch 1, 4 timesteps, --size. They vary the batch, N and the resolution. Each point
has a process of its own, so that its peak memory is measured alone. The time is that of the UNet. Beside it stands a
predicted time: the time of the common point, in proportion to floating point operations (see `flops`). The files are
written after each point.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.agreement import BenchmarkError
from benchmarks.comparing import CannotRun, Conditions, Measured, compare
from benchmarks.flops import unet_flops
from benchmarks.kinds import Spec
from benchmarks.latency import add_places, positive, progress, surroundings, workplace
from benchmarks.pipelines import PIPELINES
from benchmarks.report import png, stages, write

SCHEMA = "tiue-scaling/1"


@dataclass(frozen=True)
class Point:
    """One request: pictures, timesteps and pixels."""

    batch: int
    steps: int
    size: int  # pixels


# Each series varies one field of Point.
_LABELS = {"batch": "pictures per request", "steps": "timesteps N", "size": "pixels, height and width"}


@dataclass(frozen=True)
class Cost:
    """The cost of one point."""

    measured: Measured
    encoder_flops: int
    decoder_flops: int

    def unet_seconds(self, point: Point) -> float:
        """Return the median seconds of the UNet."""
        return stages(self.measured, point.batch)["unet"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0, or 2 after one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (BenchmarkError, CannotRun, ValueError, OSError, subprocess.CalledProcessError) as error:
        return _fail(error)


def _run(arguments: argparse.Namespace) -> int:
    place, spec = workplace(arguments), Spec.parse(arguments.contender)
    (_, side, _), pixels = place.geometry(arguments.size)
    base = Point(1, 4, side * pixels)
    series = {
        "batch": sorted({base.batch, *arguments.batches}),
        "steps": sorted({base.steps, *arguments.steps}),
        "size": sorted({base.size, *arguments.sizes}),
    }
    points = dict.fromkeys(Point(**asdict(base) | {field: x}) for field, values in series.items() for x in values)
    costs, skipped, about = dict[Point, Cost](), dict[str, str](), dict[str, str]()
    for point in sorted(points, key=lambda p: p != base):  # The common point comes first.
        shape, _ = place.geometry(point.size)
        conditions = Conditions(arguments.threads, shape, pixels, point.steps, (point.batch,), arguments.runs)
        entry = place.entry(spec, conditions, tiny=spec.options.get("vae") == "tiny", steps=series["steps"])
        progress(f"batch {point.batch}, {point.steps} timesteps, {point.size} pixels")
        done = compare({spec.name: entry}, conditions, apart=False, progress=progress)
        if spec.name in done.measured:
            flops = unet_flops(place.pipeline, shape, point.batch, point.steps)
            costs[point] = Cost(done.measured[spec.name], *flops)
            now = surroundings(conditions, done.measured)
            about = about or {"contender": spec.name, "model": arguments.model, **now}
        else:
            skipped[str(point)] = (done.skipped | done.wrong)[spec.name]
        if base not in costs:
            raise BenchmarkError(f"{base}: {skipped[str(base)]}")
        rows = [asdict(p) | {"unet_seconds": c.unet_seconds(p)} | asdict(c) for p, c in costs.items()]
        content = {"schema": SCHEMA, "about": about, "base": asdict(base), "points": rows, "skipped": skipped}
        write(arguments.out.with_name(f"{arguments.out.name}.json"), (json.dumps(content, indent=2) + "\n").encode())
        write(arguments.out.with_name(f"{arguments.out.name}.png"), png(_panels(about, costs, base, series)))
    print(_table(costs, base))
    for what, why in skipped.items():
        print(f"Left out: {what}: {why}")
    return 0


def _predicted(costs: Mapping[Point, Cost], base: Point, point: Point) -> float:
    """Return the seconds of the UNet in proportion to its operations."""
    flops = {p: costs[p].encoder_flops + costs[p].decoder_flops for p in (base, point)}
    return costs[base].unet_seconds(base) * flops[point] / flops[base]


def _table(costs: Mapping[Point, Cost], base: Point) -> str:
    lines = [
        "| batch | N | pixels | UNet, s | by operations, s | picture, s | peak, GiB (anonymous) |",
        "|---" * 7 + "|",
    ]
    for point, cost in costs.items():
        m = cost.measured
        seconds = cost.unet_seconds(point), _predicted(costs, base, point), statistics.median(m.seconds[point.batch])
        figures = " | ".join(f"{value:.3g}" for value in seconds)
        memory = f"{m.peak_bytes / 2**30:.2f} ({m.anonymous_peak_bytes / 2**30:.2f})"
        lines.append(f"| {point.batch} | {point.steps} | {point.size} | {figures} | {memory} |")
    return "\n".join(lines)


def _panels(
    about: Mapping[str, str], costs: Mapping[Point, Cost], base: Point, series: Mapping[str, Sequence[int]]
) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=120, layout="constrained")
    for i, (axes, (name, values)) in enumerate(zip(figure.subplots(1, 3), series.items(), strict=True)):
        points = [p for x in values if (p := Point(**asdict(base) | {name: x})) in costs]
        xs = [getattr(p, name) for p in points]
        axes.plot(xs, [costs[p].unet_seconds(p) for p in points], "o-", color="#4477aa", label="UNet, measured")
        predicted = [_predicted(costs, base, p) for p in points]
        axes.plot(xs, predicted, "--", color="#4477aa", label="UNet, by its operations")
        axes.set(xlabel=_LABELS[name], xticks=xs, ylim=(0, None))
        memory = axes.twinx()
        memory.plot(xs, [costs[p].measured.peak_bytes / 2**30 for p in points], "s:", color="#ee9944", label="memory")
        memory.set_ylim(0, None)
        if i == 0:
            axes.set_ylabel("seconds, median")
            lines = [*axes.get_lines(), *memory.get_lines()]
            axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False)
        if i == len(series) - 1:
            memory.set_ylabel("most memory resident, GiB")
    rest = f"else batch {base.batch}, {base.steps} timesteps, {base.size} pixels"
    figure.suptitle(f"{about['model']}, {about['contender']}: {about['cpu']}; {rest}", fontsize=10)
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Measure time and memory of TiUE by batch, timesteps and resolution, and plot them in one figure.",
    )
    parser.add_argument("--model", choices=PIPELINES, default="sd21-base", help="tiny takes seconds")
    parser.add_argument("--contender", default="tiue", help="a contender as in benchmarks.latency (default: tiue)")
    add_places(parser)
    parser.add_argument("--size", type=positive, help="pixels of the common point (default: the model's)")
    parser.add_argument(
        "--batches", type=positive, nargs="+", default=[1, 2, 4, 8], help="pictures per request (default: 1 2 4 8)"
    )
    parser.add_argument("--steps", type=positive, nargs="+", default=[1, 2, 4, 8], help="timesteps (default: 1 2 4 8)")
    parser.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        default=[256, 384, 512, 640, 768],
        help="pixels, height and width (default: 256 384 512 640 768)",
    )
    parser.add_argument(
        "--runs", type=positive, default=2, help="timed requests at each point, after a first one (default: 2)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="write PREFIX.json and PREFIX.png")
    return parser


def _fail(reason: object) -> int:
    print(f"benchmarks.scaling: error: {' '.join(str(reason).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
