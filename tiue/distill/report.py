"""What a finished run leaves for its reader: report.md, with plots of its log."""

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

_WINDOW = 50  # rows that a smoothed curve averages, at most


def write_report(out: Path) -> Path:
    """Write report.md and losses.png into the directory of a run, from its config.json and losses.csv."""
    columns = read_log(out / "losses.csv")
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    _plot(columns, out / "losses.png")
    path = out / "report.md"
    write_text(path, "\n".join(_lines(columns, settings, sorted((out / "samples").glob("*.png")))) + "\n")
    return path


def _lines(columns: Mapping[str, Any], settings: Mapping[str, Any], samples: Sequence[Path]) -> list[str]:
    steps, seconds = columns["step"], columns["seconds"]
    tenth = max(1, len(steps) // 10)
    shown = [n for n in columns if n not in ("step", "seconds", "samples_per_second", "student_lr", "fake_lr")]
    return [
        "# A distillation",
        "",
        f"{int(steps[-1])} iterations in {timedelta(seconds=round(np.nansum(seconds)))} h, "
        f"{np.nanmedian(columns['samples_per_second']):.3g} samples/s (median).",
        "",
        "![Losses, gradients and predicted noise over the iterations](losses.png)",
        "",
        "| | first tenth, mean | last tenth, mean |",
        "|---|---|---|",
        *(f"| {n} | {_mean(columns[n][:tenth])} | {_mean(columns[n][-tenth:])} |" for n in shown),
        "",
        "mu and v are the mean and the variance of the noise that is predicted at a timestep; 0 and 1 are noise's own.",
        *([f"\n![Samples](samples/{samples[-1].name})"] if samples else []),
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in settings.items()),
    ]


def _mean(values: Any) -> str:
    return f"{np.nanmean(values):.4g}" if np.isfinite(values).any() else ""


@contextmanager
def _fonts_in_a_temporary_directory() -> Iterator[None]:
    """Keep matplotlib's list of fonts out of the user's cache while it is imported for the first time."""
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ["MPLCONFIGDIR"] = directory
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


def _plot(columns: Mapping[str, Any], path: Path) -> None:
    with _fonts_in_a_temporary_directory():
        from matplotlib.figure import Figure

    groups = {
        "losses": [n for n in ("vsd", "kl", "clip", "fake") if n in columns],
        "gradient norms": ["student_grad", "fake_grad"],
        "mean of predicted noise": [n for n in columns if n.startswith("mu_")],
        "variance of predicted noise": [n for n in columns if n.startswith("v_")],
    }
    figure = Figure(figsize=(13, 7), dpi=100, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, groups.items(), strict=True):
        for name in names:
            present = np.isfinite(columns[name])
            window = min(_WINDOW, max(1, present.sum() // 10))
            smooth = np.convolve(columns[name][present], np.ones(window) / window, "valid")
            axes.plot(columns["step"][present][window - 1 :], smooth, label=name, linewidth=1)
        axes.set(title=title, xlabel="iteration")
        if title in ("losses", "gradient norms"):
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
