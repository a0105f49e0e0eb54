"""The report of a finished run: report.md, with plots of its log."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tiue.distill.runs import read_log
from tiue.files import write_text

_WINDOW = 50  # the most rows that a smoothed curve averages
_SPEED = ("step", "seconds", "samples_per_second")  # columns that are not results


def write_report(out: Path, name: str) -> Path:
    """Write report.md and losses.png into the directory of a run, from its config.json, losses.csv and samples.

    Args:
        out: directory of the run.
        name: of the method, for the title.

    Returns:
        The path of report.md.
    """
    columns = read_log(out / "losses.csv")
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    _plot(columns, out / "losses.png")
    path = out / "report.md"
    write_text(path, "\n".join(_lines(name, columns, settings, sorted((out / "samples").glob("*.png")))) + "\n")
    return path


def _lines(name: str, columns: Mapping[str, Any], settings: Mapping[str, Any], samples: Sequence[Path]) -> list[str]:
    steps, seconds = columns["step"], columns["seconds"]
    tenth = max(1, len(steps) // 10)
    noise = "mu and v are the mean and the variance of the noise predicted at a timestep; those of noise are 0 and 1."
    return [
        f"# {name.capitalize()}",
        "",
        f"{int(steps[-1])} updates in {timedelta(seconds=round(np.nansum(seconds)))} h, "
        f"{np.nanmedian(columns['samples_per_second']):.3g} samples/s (median).",
        "",
        "![Losses and gradients over the updates](losses.png)",
        "",
        "| | first tenth, mean | last tenth, mean |",
        "|---|---|---|",
        *(f"| {n} | {_mean(columns[n][:tenth])} | {_mean(columns[n][-tenth:])} |" for n in _results(columns)),
        *(["", noise] if any(n.startswith("mu_") for n in columns) else []),
        *([f"\n![Samples](samples/{samples[-1].name})"] if samples else []),
        "",
        "## Settings",
        "",
        *(f"- {setting}: {value}" for setting, value in settings.items()),
    ]


def _results(columns: Mapping[str, Any]) -> list[str]:
    """List the columns that have values, without speed and learning rates.

    A short run may not have drawn every number of steps.
    """
    return [n for n in columns if n not in _SPEED and not n.endswith("_lr") and np.isfinite(columns[n]).any()]


def _mean(values: Any) -> str:
    return f"{np.nanmean(values):.4g}" if np.isfinite(values).any() else ""


@contextmanager
def _fonts_in_a_temporary_directory() -> Iterator[None]:
    """Keep matplotlib from writing its list of fonts into the user's cache when it is first imported."""
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ["MPLCONFIGDIR"] = directory
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


def _panel(column: str) -> str:
    """Return the title of the plot that shows a column."""
    if column.endswith("_grad"):
        return "gradient norms"
    if column.startswith(("mu_", "v_")):
        return f"{'mean' if column.startswith('mu_') else 'variance'} of predicted noise"
    return "losses"


def _plot(columns: Mapping[str, Any], path: Path) -> None:
    with _fonts_in_a_temporary_directory():
        from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for name in _results(columns):
        panels.setdefault(_panel(name), []).append(name)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(13, 3.5 * rows), dpi=100, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(rows, 2, squeeze=False).flat, panels.items(), strict=False):
        for name in names:
            present = np.isfinite(columns[name])
            window = min(_WINDOW, max(1, present.sum() // 10))
            smooth = np.convolve(columns[name][present], np.ones(window) / window, "valid")
            axes.plot(columns["step"][present][window - 1 :], smooth, label=name, linewidth=1)
        axes.set(title=title, xlabel="update")
        if title in ("losses", "gradient norms"):
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
