"""What the comparison shows: a table in Markdown, plots over the latency, losses, and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from evaluation.reference import read_json
from recipes.plots import save_plot
from recipes.quality.contest import Contest
from recipes.quality.rows import Row
from tiue.distill.runs import read_log
from tiue.files import write_text

# Columns of the table: title, network, figure.
COLUMNS = (
    ("Frechet, encoder", "emoji", "frechet"),
    ("Frechet, Inception", "inception", "frechet"),
    ("KID, Inception, 1e-4", "inception", "kernel distance"),
    ("precision", "inception", "precision"),
    ("recall", "inception", "recall"),
    ("density", "inception", "density"),
    ("coverage", "inception", "coverage"),
    ("top 1", "emoji", "top 1"),
    ("diversity", "emoji", "diversity"),
    ("styles", "emoji", "styles"),
    ("evenness", "emoji", "evenness"),
)
_PLOTTED = (
    ("Frechet, encoder", "emoji", "frechet"),
    ("Frechet, Inception", "inception", "frechet"),
    ("diversity", "emoji", "diversity"),
)
_SHEET = 8  # prompts of the contact sheet


@dataclass(frozen=True)
class Entry:
    """A row of the table: a method with a number of steps, over its training seeds."""

    row: Row
    steps: int
    figures: list[dict[str, Any]]  # of each training seed
    training: list[dict[str, Any]]
    latency: dict[str, float] | None
    operations: float  # of a picture
    pictures: Path

    @property
    def title(self) -> str:
        """The method and its steps."""
        return f"{self.row.name}, {self.steps} step{'s' if self.steps > 1 else ''}"

    def value(self, network: str, figure: str) -> tuple[float, float, float]:
        """Return a figure's mean over training seeds, and an interval from the lowest end of a seed to the highest."""
        found = [of_seed.get(network, {}).get(figure) for of_seed in self.figures]
        if not all(found):
            return (float("nan"),) * 3
        mean = float(np.mean([one["value"] for one in found]))
        return mean, min(one["low"] for one in found), max(one["high"] for one in found)


def collect(contest: Contest, rows: Iterable[Row]) -> list[Entry]:
    """Read the figures of all rows that have some. Training seeds without figures are left out."""
    entries = []
    for row in rows:
        outs = contest.finished(row)
        training = [_json(out / "training.json") for out in outs]
        for steps in row.steps if outs else ():
            figures = [_json(out / f"figures-{steps}.json") for out in outs]
            latency = _json(outs[0] / f"latency-{steps}.json") or None
            operations = _json(outs[0] / f"operations-{steps}.json").get("operations", float("nan"))
            entries.append(Entry(row, steps, figures, training, latency, operations, outs[0] / f"pictures-{steps}"))
    return entries


def write_page(contest: Contest, entries: Sequence[Entry]) -> None:
    """Write table.md, runs.json, latency.png, losses.png and sheet.png into the directory of the comparison."""
    write_text(contest.out / "table.md", table(entries))
    write_text(contest.out / "runs.json", json.dumps(records(contest, entries), indent=1) + "\n")
    plot_latency(entries, contest.out / "latency.png")
    plot_losses(contest, [entry.row for entry in entries], contest.out / "losses.png")
    contact_sheet(contest, entries, contest.out / "sheet.png")


def table(entries: Sequence[Entry]) -> str:
    """Lay the figures out in Markdown: value (low to high), see `Entry.value`. A cell without a figure is blank."""
    titles = [
        "",
        "seeds",
        "updates",
        "minutes",
        "ms a picture",
        "operations a picture, 1e9",
        *(title for title, _, _ in COLUMNS),
    ]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for entry in entries:
        cells = [entry.title, str(len(entry.figures)), *_training(entry.training)]
        cells += [_milliseconds(entry.latency), "" if np.isnan(entry.operations) else f"{entry.operations / 1e9:.1f}"]
        cells += [_cell(entry.value(network, figure), figure) for _, network, figure in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def records(contest: Contest, entries: Sequence[Entry]) -> dict[str, Any]:
    """Gather what is kept of every row: its search, and the settings, the cost and the result's hash of every seed."""
    found = {}
    for row in {entry.row.name: entry.row for entry in entries}.values():
        seeds = [_json(out / "config.json") | _json(out / "training.json") for out in contest.finished(row)]
        found[row.name] = {"start": row.start, "search": _json(contest.folder(row) / "search.json"), "seeds": seeds}
    return found


def plot_latency(entries: Sequence[Entry], path: Path) -> None:
    """Plot quality and diversity over the time of a picture, of the rows that have graphs. Numbers are steps.

    The legend says over how many training seeds a row is, if several.
    """
    timed: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.latency is not None:
            timed.setdefault(entry.row.name, []).append(entry)
    colors = matplotlib.color_sequences["tab20"]  # twenty, since the usual ten would repeat
    figure, axes = plt.subplots(1, 3, figsize=(14, 5), dpi=100, layout="constrained")
    for axis, (title, network, name) in zip(axes, _PLOTTED, strict=True):
        axis.set_prop_cycle(color=colors)
        for row, of_row in timed.items():
            at = [entry.latency["median"] * 1000 for entry in of_row if entry.latency is not None]
            values, lows, highs = np.transpose([entry.value(network, name) for entry in of_row])
            beyond = np.maximum([values - lows, highs - values], 0)
            seeds = len(of_row[0].figures)
            label = f"{row} ({seeds} seeds)" if seeds > 1 else row
            axis.errorbar(at, values, beyond, fmt="o-", capsize=2, linewidth=0.8, markersize=4, label=label)
            for entry, x, y in zip(of_row, at, values, strict=True):
                axis.annotate(str(entry.steps), (x, y), fontsize=8, xytext=(4, 3), textcoords="offset points")
        axis.set(title=title, xlabel="milliseconds a picture, two cores")
    if timed:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    save_plot(figure, path)


def plot_losses(contest: Contest, rows: Sequence[Row], path: Path) -> None:
    """Plot the first loss of every trained row over its updates: each update, and the mean of a tenth of the run.

    Of several training seeds, it is the first.
    """
    logs = {row.name: contest.folder(row) / "seed-0/losses.csv" for row in rows}
    logs = {name: log for name, log in logs.items() if log.exists()}
    columns = 4
    count = max(1, -(-len(logs) // columns))
    figure, axes = plt.subplots(count, columns, figsize=(12, 2.2 * count), dpi=100, squeeze=False, layout="constrained")
    for axis in axes.flat[len(logs) :]:
        axis.axis("off")
    for axis, (name, file) in zip(axes.flat, logs.items(), strict=False):
        log = read_log(file)
        column = next(key for key in log if key != "step")
        steps, values = log["step"], log[column]
        window = max(len(values) // 10, 1)
        axis.plot(steps, values, linewidth=0.5, alpha=0.4)
        means = np.convolve(values, np.full(window, 1 / window), "valid")
        axis.plot(steps[window // 2 :][: len(means)], means, color="C0")
        axis.set_ylim(min(0, np.nanmin(values)), None)
        axis.set_title(f"{name}: {column}", fontsize=8)
        axis.tick_params(labelsize=7)
    save_plot(figure, path)


def contact_sheet(contest: Contest, entries: Sequence[Entry], path: Path) -> None:
    """Plot the first picture of the same prompts by every entry, unselected, from the same noise.

    Of several training seeds, it is the first.
    """
    chosen = np.unique(np.linspace(0, len(contest.material.prompts) - 1, _SHEET).round().astype(int))
    figure, axes = plt.subplots(
        len(entries), len(chosen), figsize=(1.1 * len(chosen) + 1.5, 1.1 * len(entries)), dpi=100, squeeze=False
    )
    for line, entry in zip(axes, entries, strict=True):
        for axis, number in zip(line, chosen, strict=True):
            with Image.open(entry.pictures / f"{number:05}-1.png") as picture:
                axis.imshow(np.asarray(picture))
            axis.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(entry.title.replace(", ", ",\n"), fontsize=6, rotation=0, ha="right", va="center")
    for axis, number in zip(axes[0], chosen, strict=True):
        axis.set_title(contest.material.prompts[number].replace(", ", ",\n"), fontsize=6)
    figure.tight_layout(pad=0.3)
    save_plot(figure, path, bbox_inches="tight")


def _training(training: Sequence[dict[str, Any]]) -> list[str]:
    updates = [str(one["iterations"]) for one in training if "iterations" in one]
    minutes = [one["seconds"] / 60 for one in training if "seconds" in one]
    return [updates[0] if updates else "", f"{np.mean(minutes):.1f}" if minutes else ""]


def _milliseconds(latency: dict[str, float] | None) -> str:
    return "" if latency is None else f"{latency['median'] * 1000:.0f}"


def _cell(value: tuple[float, float, float], figure: str) -> str:
    if np.isnan(value[0]):
        return ""
    scale, form = (1e4, "{:.1f}") if figure == "kernel distance" else (1.0, "{:.3g}")
    mean, low, high = (form.format(scale * number) for number in value)
    return f"{mean} ({low} to {high})"


def _json(path: Path) -> Any:
    return read_json(path) if path.exists() else {}
