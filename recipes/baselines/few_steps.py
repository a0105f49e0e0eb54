"""What LCM and ADD share: a student that estimates the picture at any of its timesteps, and is sampled with new noise.

The student is a whole UNet. Sampling alternates between its estimate of z_0 and new noise for the next timestep, as
diffusers' LCMScheduler does. The result of a run is a pipeline directory with that scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from evaluation.few_steps import distilled, sample_few_steps
from recipes.baselines.config import FewStepsConfig
from recipes.baselines.pictures import CaptionedPictures
from recipes.directory import whole_directory
from tiue.checkpoint import load_student
from tiue.components import Components, load_components
from tiue.diffusion import Diffusion
from tiue.distill.draws import Batch
from tiue.distill.method import Method, Run, Trained
from tiue.distill.optimizers import make_optimizer
from tiue.distill.samples import pictures, sample_noise
from tiue.distill.vsd import teacher_identity
from tiue.files import fingerprint, shortened
from tiue.text_encoder import encode_text

WITHOUT_BOUNDARY = 1e4  # the timestep scaling with which c_skip of LCMScheduler is below 1e-12


class FewSteps(Method):
    """The base of LCM and ADD: teacher, student, samples, result.

    Args:
        run: the run.
        teacher: the model to distill. Its UNet is frozen.
        student: the network to train, in place.
        data: pictures with captions.
        scheduler: configuration of the LCMScheduler with which the student is sampled.
        sample_prompts: prompts of the sample grid.
        guidance: that the student takes as an input when it makes the sample grid; None if it takes none.
    """

    result = "pipeline"

    def __init__(
        self,
        run: Run,
        teacher: Components,
        student: UNet2DConditionModel,
        data: CaptionedPictures,
        scheduler: Mapping[str, Any],
        sample_prompts: Sequence[str],
        guidance: float | None = None,
    ):
        self.config, self.data, self._accelerator, self._components = run.config, data, run.accelerator, teacher
        device = run.accelerator.device
        self.diffusion = Diffusion(teacher.noise_schedule, device)
        self.teacher = teacher.unet.to(device).requires_grad_(False)
        self.vae = teacher.vae.to(device).requires_grad_(False)
        teacher.text_encoder.to(device).requires_grad_(False)
        self.null = self.embed([""])
        self.model = student.to(device).requires_grad_(True)
        self.student = self._trained(self.model, run.config.learning_rate)
        self.networks = {"student": self.student}
        self._scheduler, self._guidance = dict(scheduler), guidance
        self._samples = sample_noise(len(sample_prompts), teacher.geometry.latent_shape), list(sample_prompts)

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Tensor:
        """Turn captions into text embeddings, float32 (B, L, D)."""
        return encode_text(self._components, captions).float()

    def sample(self) -> Tensor | None:
        """Make the sample pictures, uint8 (n, 3, H, W), always from the same noise. None on other processes."""
        noise, prompts = self._samples
        text, steps = self.embed(prompts), self.config.sample_steps
        with torch.no_grad(), self._accelerator.autocast():
            predict = distilled(self.model, text, self._guidance)
            z_0 = sample_few_steps(predict, self._scheduler, noise.to(text.device), steps, range(len(prompts)))
            made = pictures(self.vae, z_0) if self._accelerator.is_main_process else None
        self.vae.to(text.device)
        return made

    def save(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write a diffusers pipeline with the averaged weights."""
        unet = UNet2DConditionModel.from_config(self.model.config)
        unet.load_state_dict(weights)
        save_pipeline(self._components, unet, LCMScheduler.from_config(self._scheduler), path)

    def describe(self, batch: Batch) -> str:
        """List the captions of a batch, shortened."""
        found = [caption for part in batch.parts for caption in self.data.of(part)[1]]
        return "prompts: " + ", ".join(repr(shortened(caption)) for caption in found)

    def _trained(self, network: torch.nn.Module, learning_rate: float) -> Trained:
        optimizer = make_optimizer("adam", network, learning_rate, self._accelerator)
        return Trained(self._accelerator, network, optimizer, self.config.grad_clip)


def grid(trained: int, steps: int) -> list[int]:
    """Return the timesteps of a grid, ascending: T/steps - 1, 2 T/steps - 1, ..., T - 1. Samples take theirs from it.

    Raises:
        ValueError: there are more steps than timesteps.
    """
    if steps > trained:
        raise ValueError(f"a grid of {steps} timesteps is finer than the teacher's {trained}")
    return [trained // steps * i - 1 for i in range(1, steps + 1)]


def lcm_scheduler(teacher: Components, original_steps: int, timestep_scaling: float) -> dict[str, Any]:
    """Return the configuration of an LCMScheduler on the teacher's noise process.

    Args:
        teacher: the model.
        original_steps: size of the grid from which the scheduler takes its timesteps.
        timestep_scaling: of its boundary conditions. A large number turns them off.
    """
    own = {"original_inference_steps": original_steps, "timestep_scaling": timestep_scaling, "clip_sample": False}
    config = {name: value for name, value in teacher.scheduler_config.items() if name != "timestep_spacing"}
    return dict(LCMScheduler.from_config(config | own).config)


def save_pipeline(components: Components, unet: UNet2DConditionModel, scheduler: Any, path: Path) -> None:
    """Write a pipeline directory whole or not at all: the parts of a model with another UNet and scheduler."""
    pipeline = StableDiffusionPipeline(
        vae=components.vae.cpu(),
        text_encoder=components.text_encoder.cpu(),
        tokenizer=components.tokenizer,
        unet=unet.cpu(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with whole_directory(path) as unfinished:
        pipeline.save_pretrained(unfinished)


def load_unet(path: Path, teacher: Components) -> UNet2DConditionModel:
    """Load the UNet of a student.safetensors or of a pipeline directory, to start from.

    Raises:
        ValueError: there is none, or it takes or predicts something else than the teacher, or learned another noise
            process.
    """
    found = load_components(path) if path.is_dir() else load_student(path).components
    for name in ("in_channels", "out_channels", "cross_attention_dim"):
        if (has := found.unet.config[name]) != (needs := teacher.unet.config[name]):
            raise ValueError(f"{path} cannot start for this teacher: its {name} is {has}, and the teacher's {needs}")
    theirs, ours = found.noise_schedule, teacher.noise_schedule
    if (has := theirs.prediction_type) != (needs := ours.prediction_type):
        raise ValueError(f"{path} cannot start for this teacher: it predicts {has}, and the teacher {needs}")
    if theirs.abar != ours.abar:
        raise ValueError(f"{path} cannot start for this teacher: it learned another noise process")
    return found.unet


def start_run(
    out: Path, config: FewStepsConfig, teacher: Components, data: CaptionedPictures, initial: Any, **more: str
) -> Run:
    """Begin or find a run, identified by its teacher, its pictures, its student's first weights, and `more`."""
    run = Run(out, config)
    run.identify(
        **teacher_identity(teacher),
        pictures=data.digest,
        init=None if initial is None else fingerprint(initial),
        **more,
    )
    return run
