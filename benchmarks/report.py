"""Reports of a comparison: a table, JSON, and a chart."""

import io
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.comparing import Measured

SCHEMA = "tiue-latency/1"  # format of the JSON, whose fields are those of comparing.Measured
# The stages, in the order of work. Their colors differ in gray, and for color-blind readers.
STAGES = {"text": "#bbbbbb", "unet": "#4477aa", "vae": "#ee9944", "other": "#333333"}
_LEGEND = {"text": "text encoder", "unet": "UNet", "vae": "VAE", "other": "the rest"}


def stages(measured: Measured, batch: int) -> dict[str, float]:
    """Return median seconds by stage: text encoder, UNet, VAE, and the rest of the median picture."""
    runs = measured.stages[batch]
    sums = [{s: sum(t for name, t in run.items() if name.partition("_")[0] == s) for s in STAGES} for run in runs]
    medians = {stage: statistics.median(run[stage] for run in sums) for stage in STAGES}
    rest = statistics.median(measured.seconds[batch]) - sum(medians.values())
    return medians | {"other": max(rest, 0.0)}


def table(measured: Mapping[str, Measured], skipped: Mapping[str, str]) -> str:
    """Return a Markdown table, the fastest contender first, with the skipped ones below it.

    The last column has two figures: the relative difference of the first noise prediction, and the PSNR of latents or
    picture, whichever is lower.
    """
    gpu = any(m.gpu_bytes for m in measured.values())
    heads = ["contender", "batch", "picture, s (least .. most)", "text", "UNet", "VAE", "load, s", "cold start, s"]
    heads += ["peak, GiB (anonymous)", *(["GPU, GiB"] if gpu else []), "weights, GiB", "installed, MB", "differs by"]
    rows = [heads, ["---"] * len(heads)]
    for name, batch in ranked(measured):
        m = measured[name]
        seconds, parts = m.seconds[batch], stages(m, batch)
        memory = [f"{m.peak_bytes / 2**30:.2f} ({m.anonymous_peak_bytes / 2**30:.2f})"]
        memory += [f"{m.gpu_bytes / 2**30:.2f}"] if gpu else []
        rows.append(
            [
                name,
                str(batch),
                f"{statistics.median(seconds):.3g} ({min(seconds):.3g} .. {max(seconds):.3g})",
                *(f"{parts[stage]:.3g}" for stage in ("text", "unet", "vae")),
                f"{statistics.median(m.load_seconds):.3g}",
                f"{statistics.median(m.cold_seconds):.3g}",
                *memory,
                f"{m.weights_bytes / 2**30:.2f}",
                f"{m.installed.bytes / 1e6:.0f}",
                _agrees(m),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    return "\n".join([*lines, *[""][: len(skipped)], *(f"Left out: {name}: {why}" for name, why in skipped.items())])


def ranked(measured: Mapping[str, Measured]) -> list[tuple[str, int]]:
    """Return pairs of contender and batch, sorted by batch, then by median seconds."""
    pairs = [(name, batch) for name, m in measured.items() for batch in m.seconds]
    return sorted(pairs, key=lambda pair: (pair[1], statistics.median(measured[pair[0]].seconds[pair[1]])))


def save(out: Path, about: Mapping[str, Any], measured: Mapping[str, Measured], skipped: Mapping[str, str]) -> None:
    """Write OUT.json, OUT.md and OUT.png."""
    contenders = {name: asdict(m) for name, m in measured.items()}
    content = {"schema": SCHEMA, "about": about, "contenders": contenders, "skipped": skipped}
    write(out.with_name(f"{out.name}.json"), (json.dumps(content, indent=2) + "\n").encode())
    words = "\n".join(f"- {key}: {value}" for key, value in about.items())
    write(out.with_name(f"{out.name}.md"), f"{words}\n\n{table(measured, skipped)}\n".encode())
    write(out.with_name(f"{out.name}.png"), bars(about, measured))


def bars(about: Mapping[str, Any], measured: Mapping[str, Measured]) -> bytes:
    """Return a chart as PNG: one bar per contender at the smallest batch, made of its stages, the fastest on top."""
    from matplotlib.figure import Figure

    batch = min(batch for m in measured.values() for batch in m.seconds)
    names = [name for name, b in ranked(measured) if b == batch]
    figure = Figure(figsize=(10, 1.6 + 0.5 * len(names)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    longest = max(max(measured[name].seconds[batch]) for name in names)
    left = [0.0] * len(names)
    for stage, color in STAGES.items():
        widths = [stages(measured[name], batch)[stage] for name in names]
        if max(widths) < longest / 200:
            continue  # The bar would be too short to see.
        axes.barh(names, widths, left=left, color=color, height=0.7, label=_LEGEND[stage])
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > longest / 14:
                axes.text(start + width / 2, row, f"{width:.3g}", ha="center", va="center", color="white", fontsize=8)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, name in enumerate(names):
        seconds = measured[name].seconds[batch]
        median = statistics.median(seconds)
        if len(seconds) > 1:
            spread = [[median - min(seconds)], [max(seconds) - median]]
            axes.errorbar([median], [row], xerr=spread, color="black", capsize=3, linewidth=1)
        axes.text(max(seconds) + longest / 100, row, f"{median:.3g} s", va="center", fontweight="bold", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.12)
    axes.set_xlabel("seconds per request: median, with least and most")
    axes.set_title(f"{about['model']}: {about['picture']}, batch {batch}\n{about['cpu']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=9)
    return png(figure)


def png(figure: Any) -> bytes:
    """Return the PNG file of a matplotlib figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _agrees(measured: Measured) -> str:
    """Return the last column of `table`."""
    compared = measured.compared
    decibels = [compared[what].value for what in ("latents", "picture") if what in compared]
    found = [f"{compared['eps'].value:.0e}"] if "eps" in compared else []
    found += [f"{min(decibels):.0f} dB"] if decibels else []
    return ", ".join(found) or ("the reference" if measured.timesteps else "not comparable")
