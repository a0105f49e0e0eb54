"""Plots, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from tiue.files import written_whole


def save_plot(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as PNG, with options of `Figure.savefig`, and close it."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", **options)
    plt.close(figure)
