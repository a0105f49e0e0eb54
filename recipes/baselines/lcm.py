"""Latent consistency models (LCM): consistency distillation of the guided ODE. arXiv 2310.04378.

A consistency function maps every point of a path of the ODE to its end:

    f(z, w, t) = c_skip(t) z + c_out(t) z_0(z, w, t),
    c_skip(t) = s^2 / ((10 t)^2 + s^2),   c_out(t) = 10 t / sqrt((10 t)^2 + s^2),   s = sigma_data = 0.5,

where z_0(z, w, t) is the picture that the student's prediction implies. f(z, w, 0) = z by construction. The guidance
scale w ~ U[w_min, w_max] is an input of the student, embedded beside the timestep. With a picture's latents z_0 and

    z_{t_n+k} = sqrt(abar) z_0 + sqrt(1 - abar) noise,          for t_{n+k} of a grid of DDIM timesteps
    z_{t_n}   = one DDIM step of the teacher, guided by w,      from t_{n+k} to t_{n+k} - k
    loss      = mean of sqrt(d^2 + c^2) - c,                    d = f(z_{t_n+k}, w, t_{n+k}) - f'(z_{t_n}, w, t_n),

the student learns to give the same answer at both points. f' is a moving average of the student, without gradient.
The student is sampled in 1, 2 or 4 steps: f, new noise for the next timestep, f ...
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from recipes.baselines.config import LcmConfig
from recipes.baselines.few_steps import FewSteps, grid, lcm_scheduler, start_run
from recipes.baselines.pictures import CaptionedPictures, encode_latents
from tiue.components import Components
from tiue.distill.draws import Batch, Draws
from tiue.distill.method import Means, Run
from tiue.distill.runs import Stateful
from tiue.distill.scores import guided
from tiue.fold import embed_guidance

_GUIDANCE_SIZE = 256  # of the embedding of the guidance scale


class Lcm(FewSteps):
    """A student that learns to be consistent along the teacher's paths. See the module, and `prepare`."""

    name = "lcm"
    columns = ("loss",)
    config: LcmConfig

    def __init__(
        self,
        run: Run,
        config: LcmConfig,
        teacher: Components,
        student: UNet2DConditionModel,
        data: CaptionedPictures,
        sample_prompts: Sequence[str],
    ):
        scheduler = lcm_scheduler(teacher, config.ddim_steps, config.timestep_scaling)
        middle = (config.guidance_min + config.guidance_max) / 2
        super().__init__(run, teacher, student, data, scheduler, sample_prompts, middle)
        self._grid = torch.tensor(grid(len(self.diffusion.abar), config.ddim_steps), device=run.accelerator.device)
        self.target = copy.deepcopy(self.model).requires_grad_(False)

    def update(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Update the student once, then move the target towards it."""
        means = Means()
        for part in self.student.accumulating(batch.parts):
            pixels, captions = self.data.of(part)
            loss = self.loss(encode_latents(self.vae, pixels), self.embed(captions), part.draws)
            self.student.backward(loss / len(batch.parts))
            means.add(len(batch.parts), loss=loss)
        self.student.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.target.parameters()), list(self.model.parameters()), 1 - self.config.target_decay
            )
        return means.values

    def loss(self, z_0: Tensor, text: Tensor, draws: Draws) -> Tensor:
        """Compute the consistency loss of latents (B, C, h, w) and text embeddings (B, L, D), a scalar."""
        config = self.config
        later = self._grid[draws.integers(0, len(self._grid))]
        earlier = (later - config.skip).clamp(min=0)
        w = config.guidance_min + (config.guidance_max - config.guidance_min) * draws.uniform()
        z_later = self.diffusion.noised(z_0, draws.normal(z_0.shape[1:]), later)
        with torch.no_grad(), self._accelerator.autocast():
            z_earlier = self.teacher_step(z_later, later, earlier, text, w)
            target = self.consistency(self.target, z_earlier, earlier, text, w)
        with self._accelerator.autocast():
            estimate = self.consistency(self.student, z_later, later, text, w)
        return pseudo_huber(estimate, target, config.huber_c)

    def teacher_step(self, z: Tensor, t: Tensor, landing: Tensor, text: Tensor, w: Tensor) -> Tensor:
        """Make one guided DDIM step (eq. 12 of arXiv 2010.02502) of z (B, C, h, w).

        Timesteps t and `landing` are int64 (B,), text is (B, L, D), and w, the guidance scales, is (B,).
        """
        predicted = guided(self.teacher, z, t, text, self.null, w.view(-1, 1, 1, 1))
        return self.diffusion.noised(
            self.diffusion.picture(predicted, z, t), self.diffusion.noise(predicted, z, t), landing
        )

    def consistency(self, network: Callable[..., Any], z: Tensor, t: Tensor, text: Tensor, w: Tensor) -> Tensor:
        """Compute f(z, w, t) of a network, float32 (B, C, h, w). Shapes are those of `teacher_step`."""
        predicted = network(z, t, text, None, embed_guidance(w, _GUIDANCE_SIZE)).sample.float()
        c_skip, c_out = boundary_conditions(t, self.config.sigma_data, self.config.timestep_scaling)
        return c_skip * z + c_out * self.diffusion.picture(predicted, z, t)

    def state(self) -> Mapping[str, Stateful]:
        """Return the target, for checkpoints."""
        return {"target": self.target}


def boundary_conditions(t: Tensor, sigma_data: float, scaling: float) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out of timesteps (B,), both (B, 1, 1, 1)."""
    scaled = (scaling * t.float()).view(-1, 1, 1, 1)
    square = scaled.square() + sigma_data**2
    return sigma_data**2 / square, scaled / square.sqrt()


def pseudo_huber(estimate: Tensor, target: Tensor, c: float) -> Tensor:
    """Return the mean of sqrt(d^2 + c^2) - c, with d = estimate - target."""
    return ((estimate - target).square() + c**2).sqrt().sub(c).mean()


def guided_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy a UNet into one that takes a guidance scale as an input, too. At first, the scale changes nothing.

    Raises:
        ValueError: the UNet cannot take one.
    """
    copied = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=_GUIDANCE_SIZE)
    missing, unexpected = copied.load_state_dict(unet.state_dict(), strict=False)
    if unexpected or missing != ["time_embedding.cond_proj.weight"]:
        raise ValueError(f"the UNet cannot take a guidance scale: {[*missing, *unexpected]}")
    nn.init.zeros_(copied.time_embedding.cond_proj.weight)
    return copied.eval()


def prepare(
    teacher: Components,
    data: CaptionedPictures,
    out: Path,
    config: LcmConfig,
    *,
    initial: UNet2DConditionModel | None = None,
    sample_prompts: Sequence[str] = (),
) -> tuple[Run, Lcm]:
    """Prepare latent consistency distillation for `loop.train`.

    Args:
        teacher: the model to distill.
        data: pictures with captions.
        out: directory of the run.
        config: the settings.
        initial: a UNet to start from, instead of the teacher's weights.
        sample_prompts: prompts of the sample grid.

    Returns:
        The run and the method.

    Raises:
        ValueError: `out` holds another run, the grid is finer than the teacher's timesteps, or FSDP is on.
    """
    run = start_run(out, config, teacher, data, initial)
    if run.accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("LCM runs with DDP, not with FSDP: its target is a copy of the whole student")
    student = guided_unet(teacher.unet if initial is None else initial)
    return run, Lcm(run, config, teacher, student, data, sample_prompts)
