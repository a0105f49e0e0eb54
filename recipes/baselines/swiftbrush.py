"""SwiftBrush: one-step variational score distillation, without pictures. arXiv 2312.05239.

The student makes its picture from noise in one step at the last timestep T, and a fake score with adapters (LoRA)
follows it:

    z_0 = (z_T - sqrt(1 - abar_T) eps(z_T, T)) / sqrt(abar_T),
    student:     grad of z_0 = w(t) (eps_teacher(z_t, t) - eps_fake(z_t, t)),    z_t = noised z_0,   t ~ U{20..980},
    fake score:  abar_t |eps_fake(z_t, t) - noise|^2 on the student's pictures, by turns with the student.

Here w(t) = 1 - abar_t. This is TiUE's VSD (see `tiue.distill.vsd`) with one step and without the KL term, so it is that
code. The fake score's loss is TiUE's, too: in SwiftBrush's paper it has no weight abar_t.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from diffusers import UNet2DConditionModel

from tiue.checkpoint import Student
from tiue.components import Components
from tiue.distill import vsd
from tiue.distill.clip import Alignment
from tiue.distill.config import DistillConfig
from tiue.distill.method import Run
from tiue.distill.vsd import Vsd


def prepare(
    teacher: Components,
    prompts: Iterable[str],
    out: Path,
    config: DistillConfig,
    *,
    initial: UNet2DConditionModel | None = None,
    sample_prompts: Sequence[str] | None = None,
    alignment: Alignment | None = None,
    method: type[Vsd] = Vsd,
) -> tuple[Run, Vsd]:
    """Prepare one-step VSD for `loop.train`.

    Args:
        teacher: the model to distill. Its UNet is changed in place.
        prompts: captions. No pictures are needed.
        out: directory of the run.
        config: the settings.
        initial: a UNet to start from, instead of the teacher's weights.
        sample_prompts: prompts of the sample grid, by default the first eight of `prompts`.
        alignment: of pictures with captions, if `clip_weight` is above 0.
        method: the class, for a method that derives from this one.

    Returns:
        The run and the method.

    Raises:
        ValueError: the settings are not those of one step, or as for `vsd.prepare`.
    """
    if config.steps != (1,) or config.kl_weight:
        raise ValueError(f"one-step VSD has `steps` 1 and `kl_weight` 0, got {config.steps} and {config.kl_weight}")
    teacher = from_pure_noise(teacher)
    student = None if initial is None else one_step_student(teacher, initial)
    return vsd.prepare(
        teacher,
        prompts,
        out,
        config,
        initial=student,
        sample_prompts=sample_prompts,
        clip=alignment,
        method=method,
    )


def from_pure_noise(teacher: Components) -> Components:
    """Change the spacing of a model's timesteps so that one step begins at the last one, where there is only noise."""
    return replace(teacher, scheduler_config=teacher.scheduler_config | {"timestep_spacing": "trailing"})


def one_step_student(teacher: Components, unet: UNet2DConditionModel) -> Student:
    """Make a student of one step from any UNet that denoises like the teacher."""
    timesteps = teacher.noise_schedule.timesteps(1)
    return Student(replace(teacher, unet=unet), timesteps[0], {1: timesteps}, teacher.name)
