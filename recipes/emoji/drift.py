"""`python -m recipes.emoji.drift`: what the KL term does to the noise that a student predicts.

A teacher is made of the shipped student: its UNet learns to denoise the drawings again. Two students are then distilled
from that teacher's own weights, with the KL term and without, all else equal. Writes drift.json and drift.png (mean and
variance of the predicted noise over the iterations), and the directories of both runs, with their samples.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from tiue.checkpoint import load_student
from tiue.components import load_components
from tiue.distill import Distillation

from . import data, loop
from .presets import PRESETS
from .sharing import SHIPPED
from .student import all_captions, draw_captions
from .teacher import colour_weight, denoising, save_teacher

_LR = 2e-4  # of the teacher; falls to zero


def main(argv: list[str] | None = None) -> int:
    """Train, distil and draw."""
    parser = argparse.ArgumentParser(prog="python -m recipes.emoji.drift", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, default=800, help="of the teacher (default: 800)")
    parser.add_argument("--iterations", type=int, default=240, help="of each distillation (default: 240)")
    parser.add_argument("--out", type=Path, default=Path("runs/drift"), help="directory of all that is made")
    arguments = parser.parse_args(argv)
    preset, out = PRESETS[arguments.preset], arguments.out
    drawings = data.prepare(out / "data", preset.resolution, preset.all_concepts)
    if not (out / "teacher/model_index.json").exists():
        components = load_student(SHIPPED).components
        unet = components.unet.to(loop.device()).requires_grad_(True)
        loss = denoising(unet, preset, drawings, components.vae)
        loop.train(
            unet,
            partial(loss, weight=colour_weight),
            steps=arguments.steps,
            lr=_LR,
            seed=preset.seed + 3,
            out=out / "teacher-again",
            ema_decay=0.99,
            weight_decay=0.01,
        )
        save_teacher(unet, components.vae, out / "teacher")
    runs = {"with KL": 0.8, "without KL": 0.0}
    for name, weight in runs.items():
        precision = "bf16" if loop.computes_in_bf16(loop.device().type) else "no"
        config = replace(
            preset.distil, kl_weight=weight, iterations=arguments.iterations, mixed_precision=precision, keep=1
        )
        Distillation(
            load_components(out / "teacher"),
            all_captions(drawings),
            out / _directory(name),
            config,
            sample_prompts=draw_captions(drawings, 32, preset.seed + 1),
        ).run()
    logs = {name: _log(out / _directory(name) / "losses.csv") for name in runs}
    _plot(logs, out / "drift.png")
    last = {
        name: {column: float(np.mean(values[-10:])) for column, values in log.items()} for name, log in logs.items()
    }
    (out / "drift.json").write_text(json.dumps(last, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(last, indent=2))
    return 0


def _directory(name: str) -> str:
    return name.replace(" ", "-").lower()


def _log(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def _plot(logs: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    columns = [name for name in next(iter(logs.values())) if name.startswith(("mu_", "v_"))]
    panels = {"mean of the predicted noise": "mu_", "variance of the predicted noise": "v_"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), dpi=120, layout="constrained")
    for axis, (title, prefix) in zip(axes, panels.items(), strict=True):
        for (name, log), style in zip(logs.items(), ("-", "--"), strict=True):
            for i, column in enumerate(c for c in columns if c.startswith(prefix)):
                label = f"t = {column.removeprefix(prefix)}, {name}"
                axis.plot(log["step"], log[column], style, color=f"C{i}", linewidth=1, label=label)
        axis.axhline({"mu_": 0.0, "v_": 1.0}[prefix], color="black", linewidth=0.5)
        axis.set(title=title, xlabel="iteration")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
