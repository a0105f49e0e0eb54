"""`python -m recipes.emoji.studies.sharing`: the cost of `shared_up_blocks` in quality, and the time that it saves.

models/emoji/student.safetensors, the student of the 64-pixel model, is trained further to reproduce its own pictures
from the same captions and noise. This is done twice: unchanged, and with one up block shared. The first is the control,
because bfloat16 and averaging also have a cost.
Writes sharing.json and sharing.png: distances to the shipped student's latents, and the judge's figures as in the
recipe's report.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.directory import claim
from recipes.emoji import data
from recipes.emoji.measure import load_judge
from recipes.emoji.presets import PRESETS, Preset
from recipes.emoji.report import GRID_PROMPTS, asked, plot_students, sample_student
from recipes.emoji.stage import device, minimize
from recipes.emoji.student import all_captions
from tiue.checkpoint import Student, load_student, save_student
from tiue.distill.command import status_of
from tiue.files import write_text
from tiue.text_encoder import encode_text

SHIPPED = Path(__file__).parents[3] / "models/emoji/student.safetensors"
DISTANCE_PAIRS = 256  # captions of the report, each with its own noise
TIMED = 50  # passes


def main(argv: list[str] | None = None) -> int:
    """Train, measure and plot; on failure, print one line that says why.

    Returns:
        0; 1 if a training diverged; 2 if it cannot run; 128 plus the number of the signal that stopped it.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.emoji.studies.sharing", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="the judge's size, and the rate and batch")
    parser.add_argument("--steps", type=int, default=600, help="of each (default: 600)")
    parser.add_argument("--out", type=Path, default=Path("runs/sharing"), help="directory of all results")
    arguments = parser.parse_args(argv)
    return status_of(parser.prog, lambda: _study(arguments.preset, arguments.steps, arguments.out))


def preset_of_shipped(name: str) -> Preset:
    """Return a preset of the recipe at the resolution of the shipped student, whose latents have one size only."""
    geometry = load_student(SHIPPED).components.geometry
    return replace(PRESETS[name], resolution=geometry.height * geometry.pixels_per_latent)


def _study(preset_name: str, steps: int, out: Path) -> None:
    preset = preset_of_shipped(preset_name)
    claim(out, asdict(preset) | {"steps": steps})
    drawings = data.prepare(out / "data", preset.resolution, preset.all_concepts)
    shipped = load_student(SHIPPED)
    contenders = {"shipped": shipped}
    for count in (0, 1):
        path = out / f"shared-{count}.safetensors"
        if not path.exists():
            captions = all_captions(drawings)
            save_student(path, _continued(shipped, count, captions, preset, steps, out / f"runs/shared-{count}"))
        contenders[f"{count} shared, {steps} steps"] = load_student(path)
    contenders["1 shared, untrained"] = replace(load_student(SHIPPED), shared_up_blocks=1)

    rows = asked(drawings)
    captions, concept = [drawings.caption(row, 0, True) for row in rows], drawings.concept[rows]
    judge = load_judge(preset, drawings, out / "encoder")
    target = _latents(shipped, captions[:DISTANCE_PAIRS])
    figures = {}
    for name, student in contenders.items():
        figures[name] = judge.measure(sample_student(student, captions), concept)
        error = F.mse_loss(_latents(student, captions[:DISTANCE_PAIRS]), target) / target.var()
        figures[name] |= {"latents": error.sqrt().item(), "milliseconds": 1e3 * _seconds(student)}
    write_text(out / "sharing.json", json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    plot_students(contenders, out / "sharing.png")


def _continued(shipped: Student, count: int, captions: list[str], preset: Preset, steps: int, out: Path) -> Student:
    """Return `shipped` with `count` shared up blocks, after `steps` of regression on its pictures without sharing."""
    teacher = shipped.tiue().to(device()).eval()
    student = replace(load_student(SHIPPED), shared_up_blocks=count)
    model = student.tiue().to(device())
    components = student.components
    components.text_encoder.to(device()).requires_grad_(False)

    def loss(generator: torch.Generator, count: int) -> Tensor:
        rows = torch.randint(len(captions), (count,), generator=generator)
        noise = torch.randn(len(rows), *components.geometry.latent_shape, generator=generator)
        noise = noise.to(device())
        with torch.no_grad():
            text = encode_text(components, [captions[row] for row in rows])
            target = teacher(noise, text)
        return F.mse_loss(model(noise, text), target)

    minimize(
        model,
        loss,
        out,
        iterations=steps,
        batch_size=preset.regression_batch,
        learning_rate=preset.regression_lr,
        ema_decay=0.99,
        seed=preset.seed + 2,
    )
    return student


@torch.no_grad()
def _latents(student: Student, captions: list[str]) -> Tensor:
    """Return z_0 in float32. Caption j has the noise of a generator with seed j."""
    shape, model = student.components.geometry.latent_shape, student.tiue().to(device())
    student.components.text_encoder.to(device())
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(j)) for j in range(len(captions))])
    return model(noise.to(device()), encode_text(student.components, captions))


@torch.no_grad()
def _seconds(student: Student) -> float:
    """Return the median seconds of one picture's UNet in PyTorch."""
    model, text = student.tiue().to(device()), encode_text(student.components, GRID_PROMPTS[:1])
    noise = torch.randn(1, *student.components.geometry.latent_shape, device=device())
    taken = []
    for _ in range(TIMED):
        start = time.perf_counter()
        model(noise, text).cpu()  # which waits for a GPU
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


if __name__ == "__main__":
    sys.exit(main())
