"""Further training of the image decoder. The encoder does not change, so all latents stay valid.

The teacher and the student need only latents. The look of pictures depends on the image decoder as well. `polish` makes
it better at drawings. `fit` then teaches it the errors of a student's latents, so that it draws what the teacher meant.
A student's errors show most in plain backgrounds, as faint clouds.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from recipes.directory import whole_directory
from recipes.emoji.autoencoder import decode, encode, gradient_loss, to_pixels
from recipes.emoji.data import Drawings
from recipes.emoji.presets import Preset
from recipes.emoji.stage import Loss, autocast, device, minimize, on_device
from recipes.emoji.student import load_pairs
from tiue.checkpoint import Student, load_student, save_student
from tiue.components import decode_latents, load_components
from tiue.text_encoder import encode_text

LATENT_NOISE = 0.05  # in standard deviations of the latents; `polish` adds it
LARGEST_ERROR = 1.2  # `fit` scales a student's errors by 0 to this
_BATCH = 64


def polish(preset: Preset, drawings: Drawings, source: Path, directory: Path) -> None:
    """Copy the teacher pipeline `source` to `directory` (once), with an image decoder that is trained further."""
    if directory.exists():
        return
    vae = AutoencoderKL.from_pretrained(source / "vae").to(device())
    images = _both_ways(drawings)
    latents = encode(vae, images)

    def loss(generator: torch.Generator, count: int) -> Tensor:
        random = on_device(generator)
        rows = torch.randint(len(images), (count,), generator=random, device=images.device)
        z = latents[rows]
        z = z + LATENT_NOISE * torch.randn(z.shape, generator=random, device=z.device)
        return _difference(vae, z, images[rows])

    _train_decoder(
        vae,
        loss,
        directory.parent / "runs/polish",
        iterations=preset.polish_steps,
        batch_size=preset.autoencoder_batch,
        learning_rate=preset.polish_lr,
        seed=preset.seed + 2,
    )
    with whole_directory(directory) as unfinished:
        shutil.copytree(source, unfinished)
        vae.save_pretrained(unfinished / "vae")


def fit(preset: Preset, drawings: Drawings, teacher: Path, pairs: Path, source: Path, path: Path) -> None:
    """Write the student `source` to `path` (once), with the teacher's image decoder, fitted to the student's errors.

    Half of each batch are training drawings: their latents with an error of the student, and their own pixels. The
    other half are the student's latents for the noise of a pair, and the teacher's picture from that noise.

    Args:
        preset: the settings.
        drawings: the data set.
        teacher: a pipeline directory, for the image decoder.
        pairs: the teacher's pairs of noise and latents, from `student.make_pairs`.
        source: the student.
        path: of the result.
    """
    if path.exists():
        return
    student, vae = load_student(source), load_components(teacher).vae.to(device()).eval()
    images = _both_ways(drawings)
    latents = encode(vae, images)
    made, meant = student_latents(student, pairs, preset.fit_pairs)
    errors, targets = made - meant, decode(vae, meant).to(device())

    def loss(generator: torch.Generator, count: int) -> Tensor:
        random = on_device(generator)

        def rows(values: Tensor, count: int) -> Tensor:
            return torch.randint(len(values), (count,), generator=random, device=values.device)

        drawn, paired = rows(images, count // 2), rows(made, count - count // 2)
        error = errors[rows(errors, len(drawn))]
        mirror, scale = torch.rand(2, len(drawn), 1, 1, 1, generator=random, device=error.device)
        error = LARGEST_ERROR * scale * torch.where(mirror < 0.5, error.flip(-1), error)
        z = torch.cat([latents[drawn] + error, made[paired]])
        return _difference(vae, z, torch.cat([images[drawn], targets[paired]]))

    _train_decoder(
        vae,
        loss,
        path.parent / "runs/fit",
        iterations=preset.fit_steps,
        batch_size=preset.fit_batch,
        muon=preset.fit_muon,
        learning_rate=preset.polish_lr,
        seed=preset.seed + 3,
    )
    fitted = {"image decoder": f"fitted to {preset.fit_pairs} pictures of the student", "steps": preset.fit_steps}
    history = [*student.provenance.get("history", []), fitted]
    components = replace(student.components, vae=vae)
    save_student(path, replace(student, components=components, provenance=student.provenance | {"history": history}))


@torch.no_grad()
def student_latents(student: Student, pairs: Path, count: int) -> tuple[Tensor, Tensor]:
    """Compute the student's latents, and the teacher's, for the noise of the first pairs.

    Args:
        student: the student. Its numbers of timesteps take turns from batch to batch.
        pairs: as for `fit`.
        count: number of pairs.

    Returns:
        Two tensors (count, C, h, w) on the device of the recipe.

    Raises:
        ValueError: there are fewer pairs.
    """
    known = load_pairs(pairs)
    if count > (known_pairs := len(known["noise"])):
        raise ValueError(f"`fit_pairs` must be at most {known_pairs}, the teacher's pairs, got {count}")
    noise, latents = (known[name][:count].to(device()) for name in ("noise", "latents"))
    model, components = student.tiue().to(device()).eval(), student.components
    components.text_encoder.to(device())
    schedules = [components.noise_schedule.closed_form(timesteps) for timesteps in student.schedules.values()]
    made = []
    for i, start in enumerate(range(0, len(noise), _BATCH)):
        part = slice(start, min(start + _BATCH, len(noise)))
        with autocast():
            text = encode_text(components, known["captions"][part])
            made.append(model(noise[part], text, schedules[i % len(schedules)]).float())
    return torch.cat(made), latents


def _both_ways(drawings: Drawings) -> Tensor:
    """Return the training drawings and their mirror images, uint8 (n, H, W, 3), on the device of the recipe."""
    images = torch.from_numpy(drawings.images[~drawings.held_out]).to(device())
    return torch.cat([images, images.flip(2)])


def _difference(vae: AutoencoderKL, z: Tensor, images: Tensor) -> Tensor:
    """Compare the pictures of latents (n, C, h, w) with uint8 (n, H, W, 3), in pixels and in edges.

    A value beyond white, or below black, is no error there: it is clipped. So plain backgrounds can become plain.
    """
    x, y = to_pixels(images), decode_latents(vae, z).float()
    y = torch.where((x.abs() == 1) & (x * y > 1), x, y)
    return (y - x).abs().mean() + gradient_loss(y, x)


def _train_decoder(vae: AutoencoderKL, loss: Loss, run: Path, **settings: Any) -> None:
    vae.requires_grad_(False)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    minimize(decoder, loss, run, ema_decay=0.995, **settings)
