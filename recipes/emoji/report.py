"""The grid of the README, the loss curves and the table of figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from matplotlib import pyplot as plt
from tiue_runtime import Pipeline
from tiue_runtime.noise import gaussian
from torch import Tensor

from recipes.emoji.autoencoder import decode
from recipes.emoji.data import Drawings
from recipes.emoji.measure import load_judge
from recipes.emoji.presets import Preset
from recipes.emoji.stage import autocast, device
from recipes.emoji.student import sample_teacher
from recipes.emoji.teacher import load_teacher
from recipes.plots import save_plot
from tiue.checkpoint import Student, load_student
from tiue.distill.runs import read_log
from tiue.files import write_text
from tiue.text_encoder import encode_text

TEACHER_STEPS = 25
BATCH = 64

MEASURED = 876  # pictures per contender: half of all (concept, style) pairs
GRID_SEED = 1
GRID_COLUMNS = 8
GRID_PROMPTS = [
    "red heart, twemoji style",
    "smiling face with sunglasses, fluent flat style",
    "cat face, twemoji style",
    "pizza, noto style",
    "strawberry, twemoji style",
    "penguin, fluent style",
    "frog, fluent style",
    "rocket, noto style",
    "house, twemoji style",
    "sunflower, fluent flat style",
    "rainbow, emojione style",
    "birthday cake, noto style",
    "panda, fluent flat style",
    "Christmas tree, noto classic style",
    "trophy, twemoji style",
    "guitar, noto style",
]


# What a person would try, written before the model was trained. Two of the things were never drawn together.
ASKED = [
    "a happy cat",
    "red sports car",
    "pizza slice, flat style",
    "a green heart",
    "unicorn",
    "house with garden",
    "smiling sun",
    "blue whale",
    "cup of coffee",
    "a dog on a skateboard",
    "robot",
    "birthday cake",
]
ASKED_TOO = [
    "a laughing face",
    "yellow school bus",
    "an ice cream cone",
    "a bunch of flowers",
    "christmas tree",
    "little penguin",
    "space rocket",
    "a slice of watermelon",
    "spooky ghost",
    "a red rose",
    "burger and fries",
    "a gold trophy, fluent style",
]
SHEET_SEEDS = range(1, 5)


def report(preset: Preset, drawings: Drawings, out: Path) -> None:
    """Measure drawings, teacher and students. Write figures.json, losses.png and grid.png into `out`."""
    judge = load_judge(preset, drawings, out / "encoder")
    pipeline = load_teacher(out / "polished")
    rows = asked(drawings)
    captions, concept = [drawings.caption(row, 0, True) for row in rows], drawings.concept[rows]
    paths = ("warm.safetensors", "distill/student.safetensors", "fitted.safetensors")
    warm, distilled, fitted = (load_student(out / path) for path in paths)
    warm = replace(warm, components=replace(warm.components, vae=pipeline.vae))  # the polished VAE, as the next has
    contenders = {
        "unseen drawings": (drawings.images[judge.unseen], drawings.concept[judge.unseen]),
        "teacher": (sample_pictures(pipeline, captions, preset.guidance), concept),
        "warm start": (sample_student(warm, captions), concept),
        "distilled": (sample_student(distilled, captions), concept),
        "with its decoder": (sample_student(fitted, captions), concept),
    }
    figures = {name: judge.measure(*pictures) for name, pictures in contenders.items()}
    write_text(out / "figures.json", json.dumps(figures, indent=2) + "\n")
    plot_losses(out, out / "losses.png")
    bundle = Pipeline.load(out / "bundle")
    grid(pipeline, bundle, drawings, GRID_PROMPTS, preset.guidance, out / "grid.png")
    for name, prompts in {"asked": ASKED, "asked-too": ASKED_TOO}.items():
        contact_sheet(bundle, prompts, out / f"{name}.png")


def asked(drawings: Drawings) -> np.ndarray:
    """Choose the rows whose captions all contenders sample, evenly from all concepts and styles."""
    return np.unique(np.linspace(0, len(drawings.images) - 1, MEASURED).round().astype(int))


@torch.no_grad()
def sample_student(student: Student, captions: list[str]) -> np.ndarray:
    """Sample pictures uint8 (n, H, W, 3) of captions from the PyTorch student. Picture j has the noise of seed j."""
    model = student.tiue().to(device()).eval()
    components = student.components
    components.text_encoder.to(device())
    components.vae.to(device())
    images = []
    for start, part in _batches(captions):
        text = encode_text(components, part)
        noise = _noise(range(start, start + len(part)), components.unet.config)
        with autocast():
            images.append(decode(components.vae, model(noise.to(text.device), text)))
    return torch.cat(images).numpy()


@torch.no_grad()
def sample_pictures(
    pipeline: StableDiffusionPipeline, captions: list[str], guidance: float, seeds: range | None = None
) -> np.ndarray:
    """Sample pictures uint8 (n, H, W, 3) of captions from the teacher, in 25 DDIM steps. Picture j has seed j."""
    seeds = seeds or range(len(captions))
    null = pipeline.encode_prompt([""], pipeline.device, 1, False)[0]
    images = []
    for start, part in _batches(captions):
        text = pipeline.encode_prompt(part, pipeline.device, 1, False)[0]
        noise = _noise(seeds[start : start + len(part)], pipeline.unet.config)
        latents = sample_teacher(pipeline, text, null, noise, TEACHER_STEPS, guidance)
        images.append(decode(pipeline.vae, latents))
    return torch.cat(images).numpy()


def grid(
    teacher: StableDiffusionPipeline,
    student: Pipeline,
    drawings: Drawings,
    prompts: list[str],
    guidance: float,
    path: Path,
) -> None:
    """Plot the teacher's pictures above the bundle's, from the same noise. Held-out pairs have a star."""
    held = {drawings.caption(row, 0, True) for row in np.flatnonzero(drawings.held_out)}
    seeds = range(GRID_SEED, GRID_SEED + len(prompts))
    styled = [student.bundle.manifest.in_style(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    above = sample_pictures(teacher, styled, guidance, seeds)
    below = (student(prompts, seed=GRID_SEED, output_type="np").images * 255).round().astype(np.uint8)
    bands = -(-len(prompts) // GRID_COLUMNS)
    figure, axes = plt.subplots(2 * bands, GRID_COLUMNS, figsize=(GRID_COLUMNS * 1.35, bands * 3.3), dpi=120)
    for axis in axes.flat:
        axis.axis("off")
    for index, prompt in enumerate(prompts):
        band, column = divmod(index, GRID_COLUMNS)
        for row, images in enumerate((above, below)):
            axes[2 * band + row, column].imshow(images[index], interpolation="lanczos")
        star = " *" if prompt in held else ""
        axes[2 * band, column].set_title(prompt.replace(", ", ",\n") + star, fontsize=7)
    figure.tight_layout(pad=0.4, h_pad=0.8)
    save_plot(figure, path, bbox_inches="tight")


def contact_sheet(student: Pipeline, prompts: list[str], path: Path) -> None:
    """Plot the bundle's pictures of each prompt, for seeds 1 to 4, unselected. Each prompt has a column."""
    count, first = len(SHEET_SEEDS), SHEET_SEEDS[0]
    columns = [student(prompt, num_images=count, seed=first).images for prompt in prompts]
    figure, axes = plt.subplots(
        len(SHEET_SEEDS), len(prompts), figsize=(len(prompts) * 1.2, len(SHEET_SEEDS) * 1.3), dpi=120
    )
    for row, pictures in zip(axes, zip(*columns, strict=True), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="lanczos")
            axis.axis("off")
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title(prompt.replace(", ", ",\n"), fontsize=7)
    figure.tight_layout(pad=0.3)
    save_plot(figure, path, bbox_inches="tight")


def plot_students(students: dict[str, Student], path: Path) -> None:
    """Plot a row of pictures per student, of GRID_PROMPTS, all from the same noise."""
    figure, axes = plt.subplots(
        len(students), len(GRID_PROMPTS), figsize=(len(GRID_PROMPTS) * 0.9, len(students)), dpi=120
    )
    for row, (name, student) in zip(axes, students.items(), strict=True):
        for axis, image in zip(row, sample_student(student, GRID_PROMPTS), strict=True):
            axis.imshow(image, interpolation="lanczos")
            axis.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(name.replace(", ", ",\n"), fontsize=7)
    figure.tight_layout(pad=0.3)
    save_plot(figure, path, bbox_inches="tight")


def plot_losses(out: Path, path: Path) -> None:
    """Plot the loss of every stage over its updates, from the logs of the runs."""
    stages = {"autoencoder": "autoencoder", "teacher": "teacher", "warm start": "warm-start"}
    logs = [(title, out / f"runs/{name}/losses.csv", "loss") for title, name in stages.items()]
    logs += [(f"distill: {name}", out / "distill/losses.csv", name) for name in ("vsd", "kl")]
    figure, axes = plt.subplots(1, len(logs), figsize=(15, 3), dpi=100)
    for axis, (title, file, column) in zip(axes, logs, strict=True):
        log = read_log(file)
        steps, values = log["step"], log[column]
        axis.plot(steps, values, linewidth=0.5, alpha=0.5)
        width = max(1, len(values) // 50)
        if len(values) > width:
            axis.plot(steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid"))
        axis.set(title=title, xlabel="step", yscale="log")
    figure.tight_layout()
    save_plot(figure, path)


def _batches(captions: list[str]) -> Iterator[tuple[int, list[str]]]:
    return ((start, captions[start : start + BATCH]) for start in range(0, len(captions), BATCH))


def _noise(seeds: range, config) -> Tensor:
    size = config.sample_size
    return torch.stack([torch.from_numpy(gaussian(seed, (config.in_channels, size, size))) for seed in seeds])
