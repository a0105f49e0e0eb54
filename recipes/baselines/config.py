"""The settings of every method, and the presets, which set some of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue.distill.config import DistillConfig, RunConfig
from tiue.settings import setting

PRESETS = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class FewStepsConfig(RunConfig):
    """Settings of a student that is sampled in a few steps.

    Raises:
        ValueError: a setting is of another type or out of range.
    """

    sample_steps: int = setting(4, "steps of the sample grids", group="the student", at_least=1)


@dataclass(frozen=True)
class LcmConfig(FewStepsConfig):
    """Settings of latent consistency distillation.

    Defaults of the skip and of the guidance are the paper's for Stable Diffusion. Those of the loss and of the target's
    average are of diffusers' training script.

    Raises:
        ValueError: a setting is of another type or out of range.
    """

    ddim_steps: int = setting(50, "DDIM timesteps of the grid", group="the losses", at_least=1)
    skip: int = setting(20, "k, the timesteps that the teacher's step skips", at_least=1)
    guidance_min: float = setting(3.0, "smallest guidance scale w", at_least=1)
    guidance_max: float = setting(15.0, "largest guidance scale w", at_least=1)
    sigma_data: float = setting(0.5, "s of the boundary conditions", above=0)
    timestep_scaling: float = setting(10.0, "factor of the timesteps in the boundary conditions", above=0)
    huber_c: float = setting(0.001, "c of the pseudo-Huber loss", above=0)
    target_decay: float = setting(0.95, "decay per update of the target's average", at_least=0, at_most=1)

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_min > self.guidance_max:
            found = f"{self.guidance_min} and {self.guidance_max}"
            raise ValueError(f"`guidance_min` must not exceed `guidance_max`, got {found}")
        if self.sample_steps > self.ddim_steps:
            found = f"{self.sample_steps} and {self.ddim_steps}"
            raise ValueError(f"`sample_steps` must not exceed `ddim_steps`, got {found}")


@dataclass(frozen=True)
class AddConfig(FewStepsConfig):
    """Settings of adversarial diffusion distillation. Defaults are the paper's.

    Raises:
        ValueError: a setting is of another type or out of range.
    """

    timesteps: tuple[int, ...] = setting(
        (999, 749, 499, 249), "timesteps at which the student works", group="the losses", at_least=0
    )
    distillation_weight: float = setting(2.5, "lambda, weight of the distillation loss", at_least=0)
    guidance: float = setting(7.5, "classifier-free guidance of the teacher", at_least=0)
    penalty_weight: float = setting(1e-5, "gamma, weight of R1", at_least=0)
    critic_learning_rate: float = setting(1e-4, "learning rate of the critic", above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.sample_steps > len(self.timesteps):
            found = f"{self.sample_steps} and {len(self.timesteps)}"
            raise ValueError(f"`sample_steps` must not exceed the number of `timesteps`, got {found}")


@dataclass(frozen=True)
class SwiftBrushV2Config(DistillConfig):
    """Settings of SwiftBrush v2.

    Raises:
        ValueError: a setting is of another type or out of range.
    """

    student_rank: int = setting(
        0, "rank of the student's adapters; 0 trains all of its weights", group="the student", at_least=0
    )
    clip_margin: float = setting(
        0.35,
        "tau, the mean cosine at which the CLIP loss ends; encoders other than CLIP need their own",
        at_least=-1,
        at_most=1,
    )


# What makes VSD these methods.
SWIFTBRUSH: dict[str, Any] = {"steps": (1,), "kl_weight": 0.0}
SWIFTBRUSH_V2: dict[str, Any] = SWIFTBRUSH | {"clip_weight": 0.1}
