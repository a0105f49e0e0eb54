"""`python -m recipes.emoji.studies.drift`: the effect of the KL term on the noise that a student predicts.

A teacher is made from models/emoji/student.safetensors, the student of the 64-pixel model. Its UNet learns to denoise
the drawings again, at 64 pixels. Two students then start from that teacher's weights and are distilled, one with the KL
term and one without. All else is equal. Finished parts are not repeated, and a stopped one resumes.

Writes drift.json (the last losses, and the figures of the recipe's judge) and drift.png (mean and variance of the
predicted noise over the iterations). Also writes pictures.png and the directories of both runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from recipes.directory import claim
from recipes.emoji import data
from recipes.emoji.measure import load_judge
from recipes.emoji.presets import PRESETS, Preset
from recipes.emoji.report import asked, plot_students, sample_student
from recipes.emoji.stage import device, minimize, precision
from recipes.emoji.student import all_captions, random_captions
from recipes.emoji.studies.sharing import SHIPPED, preset_of_shipped
from recipes.emoji.teacher import denoising, save_teacher
from recipes.plots import save_plot
from tiue.checkpoint import load_student
from tiue.components import load_components
from tiue.distill.command import status_of
from tiue.distill.loop import train
from tiue.distill.runs import read_log
from tiue.distill.vsd import prepare
from tiue.files import write_text

_LR = 2e-4  # of the teacher; falls to zero


def main(argv: list[str] | None = None) -> int:
    """Train, distill and plot; on failure, print one line that says why.

    Returns:
        0; 1 if a training diverged; 2 if it cannot run; 128 plus the number of the signal that stopped it.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.emoji.studies.drift", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, default=800, help="of the teacher (default: 800)")
    parser.add_argument("--iterations", type=int, default=240, help="of each distillation (default: 240)")
    parser.add_argument("--out", type=Path, default=Path("runs/drift"), help="directory of all results")
    arguments = parser.parse_args(argv)
    name, steps, iterations = arguments.preset, arguments.steps, arguments.iterations
    return status_of(parser.prog, lambda: _study(name, steps, iterations, arguments.out))


def _study(preset_name: str, steps: int, iterations: int, out: Path) -> None:
    preset = preset_of_shipped(preset_name)
    claim(out, asdict(preset) | {"steps": steps, "iterations": iterations})
    drawings = data.prepare(out / "data", preset.resolution, preset.all_concepts)
    if not (out / "teacher/model_index.json").exists():
        _make_teacher(preset, drawings, steps, out)
    runs = {"with KL": 0.8, "without KL": 0.0}
    for name, weight in runs.items():
        config = replace(preset.distill, kl_weight=weight, iterations=iterations, mixed_precision=precision(), keep=1)
        run, method = prepare(
            load_components(out / "teacher"),
            all_captions(drawings),
            out / _directory(name),
            config,
            sample_prompts=random_captions(drawings, 32, preset.seed + 1),
        )
        train(run, method)
    logs = {name: read_log(out / _directory(name) / "losses.csv") for name in runs}
    _plot(logs, out / "drift.png")
    students = {name: load_student(out / _directory(name) / "student.safetensors") for name in runs}
    before = load_student(out / _directory("with KL") / "student.safetensors")
    before.components.unet.load_state_dict(load_components(out / "teacher").unet.state_dict())
    students = {"before": before} | students
    plot_students(students, out / "pictures.png")

    figures = {name: {column: float(np.mean(log[column][-10:])) for column in log} for name, log in logs.items()}
    rows = asked(drawings)
    captions, concept = [drawings.caption(row, 0, True) for row in rows], drawings.concept[rows]
    judge = load_judge(preset, drawings, out / "encoder")
    for name, student in students.items():
        figures.setdefault(name, {}).update(judge.measure(sample_student(student, captions), concept))
    write_text(out / "drift.json", json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _make_teacher(preset: Preset, drawings: data.Drawings, steps: int, out: Path) -> None:
    components = load_student(SHIPPED).components
    unet = components.unet.to(device()).requires_grad_(True)
    minimize(
        unet,
        denoising(unet, preset, drawings, components.vae.to(device()), components.scheduler_config),
        out / "runs/teacher-again",
        weight_decay=0.01,
        iterations=steps,
        batch_size=preset.teacher_batch,
        learning_rate=_LR,
        ema_decay=0.99,
        seed=preset.seed + 3,
    )
    save_teacher(unet, components.vae, out / "teacher", components.scheduler_config)


def _directory(name: str) -> str:
    return name.replace(" ", "-").lower()


def _plot(logs: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    columns = [name for name in next(iter(logs.values())) if name.startswith(("mu_", "v_"))]
    panels = {"mean of the predicted noise": "mu_", "variance of the predicted noise": "v_"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), dpi=120, layout="constrained")
    for axis, (title, prefix) in zip(axes, panels.items(), strict=True):
        for (name, log), style in zip(logs.items(), ("-", "--"), strict=True):
            for i, column in enumerate(c for c in columns if c.startswith(prefix)):
                label = f"t = {column.removeprefix(prefix)}, {name}"
                axis.plot(log["step"], log[column], style, color=f"C{i}", linewidth=1, label=label)
        axis.axhline({"mu_": 0.0, "v_": 1.0}[prefix], color="black", linewidth=0.5)
        axis.set(title=title, xlabel="iteration")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_plot(figure, path)


if __name__ == "__main__":
    sys.exit(main())
