"""What is judged: a bundle, a teacher's pipeline or a student, each as a function from prompts to pictures.

Seed s gives the same noise everywhere, that of tiue-runtime, so pictures of one seed can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tiue_runtime import Pipeline
from tiue_runtime.noise import gaussian

from evaluation.few_steps import Predict, distilled, sample_few_steps
from tiue.checkpoint import load_student
from tiue.components import Components, decode_latents, load_components
from tiue.distill.scores import guided
from tiue.schedule import NoiseSchedule
from tiue.text_encoder import encode_text

# Prompts and seeds => pictures uint8 (prompts * seeds, H, W, 3), prompt by prompt.
Painter = Callable[[Sequence[str], range], NDArray[np.uint8]]


def bundle_painter(path: Path, steps: int | None = None) -> Painter:
    """Load a bundle. Pictures are made by tiue-runtime, on the device that it chooses.

    Args:
        path: its directory.
        steps: a step count of the bundle; None for its default.
    """
    pipeline = Pipeline.load(path)

    def paint(prompts: Sequence[str], seeds: range) -> NDArray[np.uint8]:
        # One prompt at a time: the seeds of a call go on from prompt to prompt.
        options = {"num_images": len(seeds), "seed": seeds.start, "steps": steps, "output_type": "np"}
        pictures = np.concatenate([pipeline(prompt, **options).images for prompt in prompts])
        return (pictures * 255).round().astype(np.uint8)

    return paint


def student_painter(path: Path, device: torch.device, steps: int | None = None) -> Painter:
    """Load a student.safetensors.

    Args:
        path: the file.
        device: where it computes.
        steps: a step count of the student; None for its first.
    """
    student = load_student(path)
    model = student.tiue(steps).to(device).eval()

    def sample(noise: torch.Tensor, text: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        return model(noise, text)

    return torch_painter(student.components, device, sample)


def pipeline_painter(
    path: Path, device: torch.device, steps: int, guidance: float, spacing: str | None = None
) -> Painter:
    """Load a diffusers pipeline directory, sampled by DDIM with classifier-free guidance, or by its LCMScheduler.

    Args:
        path: the directory.
        device: where it computes.
        steps: number of steps.
        guidance: 1 for none. With an LCMScheduler, it is the guidance that the UNet takes as an input, if it takes one.
        spacing: of DDIM's timesteps, "leading", "trailing" or "linspace"; None for the pipeline's own.

    Raises:
        ValueError: the directory holds no pipeline, or the settings do not fit its scheduler.
    """
    components = load_components(path, guided=True)
    if components.scheduler_config["_class_name"] == "LCMScheduler":
        if spacing is not None:
            raise ValueError(f"`spacing` is a setting of DDIM, and {path} has an LCMScheduler")
        return _few_steps_painter(components, device, steps, guidance)
    changes = {} if spacing is None else {"timestep_spacing": spacing}
    schedule = NoiseSchedule.from_config(components.scheduler_config | changes)
    timesteps = schedule.timesteps(steps)
    unet = components.unet.to(device)

    def sample(noise: torch.Tensor, text: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        null = encode_text(components, [""])

        def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return guided(unet, z, t, text, null, guidance)

        return sample_ddim(predict, schedule, timesteps, noise)

    return torch_painter(components, device, sample)


def sample_ddim(
    predict: Predict, schedule: NoiseSchedule, timesteps: Sequence[int], noise: torch.Tensor
) -> torch.Tensor:
    """Turn noise z_T (B, C, h, w) into latents z_0 by DDIM, at descending timesteps.

    `predict` takes z (B, C, h, w) and t int64 (B,), and returns eps or v, as the schedule says.
    """
    z = noise
    for t, (a, b) in zip(timesteps, schedule.ddim_steps(timesteps), strict=True):
        z = a * z + b * predict(z, torch.full((len(z),), t, device=z.device))
    return z


def _few_steps_painter(components: Components, device: torch.device, steps: int, guidance: float) -> Painter:
    unet = components.unet.to(device)

    def sample(noise: torch.Tensor, text: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        return sample_few_steps(distilled(unet, text, guidance), components.scheduler_config, noise, steps, seeds)

    return torch_painter(components, device, sample)


def torch_painter(
    components: Components,
    device: torch.device,
    sample: Callable[[torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor],
) -> Painter:
    """Make a painter of a model in PyTorch; `sample` turns noise, text and the seed of each picture into latents."""
    components.text_encoder.to(device)
    components.vae.to(device)
    shape = components.geometry.latent_shape

    @torch.no_grad()
    def paint(prompts: Sequence[str], seeds: range) -> NDArray[np.uint8]:
        text = encode_text(components, prompts).repeat_interleave(len(seeds), dim=0)
        noise = torch.from_numpy(np.stack([gaussian(seed, shape) for seed in seeds])).repeat(len(prompts), 1, 1, 1)
        image = decode_latents(components.vae, sample(noise.to(device), text, [*seeds] * len(prompts)))
        unit = (image / 2 + 0.5).clamp(0, 1) * 255
        return unit.round().byte().permute(0, 2, 3, 1).cpu().numpy()

    return paint
