"""DDIM as a weighted sum: the timesteps of a schedule and the weights that turn predictions into an image.

With eta = 0 and no clipping, a DDIM step is linear, z <- a_i z + b_i eps_i. All N steps are therefore

    z_0 = w_0 z_T + sum_i w_i eps_i,    w_0 = prod_j a_j,    w_i = b_i prod_{j>i} a_j,

and nothing at run time needs a scheduler. Where the network predicts v instead of eps the step is linear in v
just the same, and the weights multiply v.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
from diffusers import DDIMScheduler


@dataclass(frozen=True)
class Schedule:
    """Where the decoder runs, and how its predictions are summed: z_0 = w_0 z_T + sum_i w_i eps_i."""

    timesteps: tuple[int, ...]  # t_1 > ... > t_N
    noise_weight: float  # w_0
    step_weights: tuple[float, ...]  # w_1 ... w_N


def alphas_cumprod(scheduler_config: Mapping[str, Any]) -> torch.Tensor:
    """abar_t for every training timestep, float64 [T].

    The values are those of diffusers (which computes them in float32), so they are the ones the teacher knew.
    """
    return _ddim(scheduler_config).alphas_cumprod.double()


def ddim_timesteps(scheduler_config: Mapping[str, Any], steps: int) -> list[int]:
    """The `steps` timesteps, descending, that diffusers' DDIMScheduler takes with this configuration.

    Any configuration of the same family will do (PNDM, DDPM, Euler ...): betas, spacing and offset are read
    from it.
    Raises ValueError if `steps` is not between 1 and the number of training timesteps.
    """
    scheduler = _ddim(scheduler_config)
    trained = scheduler.config.num_train_timesteps
    if not 1 <= steps <= trained:
        raise ValueError(f"steps must be between 1 and {trained}, got {steps}")
    scheduler.set_timesteps(steps)
    return [int(t) for t in scheduler.timesteps]


def closed_form(scheduler_config: Mapping[str, Any], steps: int | Sequence[int]) -> Schedule:
    """The schedule of `steps`: a number of DDIM steps, or the descending timesteps themselves.

    Weights are computed in float64. Raises ValueError if the timesteps do not fit the scheduler, or if the
    configuration asks for something that is not linear (see `_ddim`).
    """
    scheduler = _ddim(scheduler_config)
    timesteps = ddim_timesteps(scheduler_config, steps) if isinstance(steps, int) else [int(t) for t in steps]
    abar = scheduler.alphas_cumprod.double().tolist()
    final = float(scheduler.final_alpha_cumprod)
    if not timesteps or any(not 0 <= t < len(abar) for t in timesteps):
        raise ValueError(f"timesteps must lie in 0..{len(abar) - 1}, got {timesteps}")
    if any(later >= t for t, later in pairwise(timesteps)):
        raise ValueError(f"timesteps must be descending, got {timesteps}")

    step = _STEPS[scheduler.config.prediction_type]
    noise_weight, step_weights = 1.0, []
    for t, previous in zip(timesteps, _arrivals(scheduler_config, timesteps), strict=True):
        if abar[t] == 0.0 and scheduler.config.prediction_type == "epsilon":
            raise ValueError(f"epsilon prediction says nothing at timestep {t}: zero terminal SNR needs v")
        a, b = step(abar[t], abar[previous] if previous >= 0 else final)
        noise_weight *= a
        step_weights = [w * a for w in step_weights] + [b]
    return Schedule(tuple(timesteps), noise_weight, tuple(step_weights))


def _arrivals(scheduler_config: Mapping[str, Any], timesteps: list[int]) -> list[int]:
    """The timestep each step lands on; negative means the end of the chain.

    DDIMScheduler lands T // N below t_i. With "linspace" spacing, and with "trailing" when N does not divide
    T, that is not t_{i+1}; we do as it does, so that a student samples like its teacher. Timesteps other than
    its own land on the next.
    """
    if timesteps == ddim_timesteps(scheduler_config, len(timesteps)):
        stride = len(alphas_cumprod(scheduler_config)) // len(timesteps)
        return [t - stride for t in timesteps]
    return [*timesteps[1:], -1]


def _epsilon_step(abar: float, abar_next: float) -> tuple[float, float]:
    """DDIM, eq. 12 of arXiv 2010.02502 with sigma = 0: the a and b of z <- a z + b eps."""
    a = sqrt(abar_next / abar)
    return a, sqrt(1 - abar_next) - a * sqrt(1 - abar)


def _v_step(abar: float, abar_next: float) -> tuple[float, float]:
    """The same with x_0 = sqrt(abar) z - sqrt(1-abar) v and eps = sqrt(abar) v + sqrt(1-abar) z."""
    a = sqrt(abar_next * abar) + sqrt((1 - abar_next) * (1 - abar))
    return a, sqrt((1 - abar_next) * abar) - sqrt(abar_next * (1 - abar))


_STEPS = {"epsilon": _epsilon_step, "v_prediction": _v_step}


def _ddim(scheduler_config: Mapping[str, Any]) -> DDIMScheduler:
    """DDIMScheduler for a configuration of its family; ValueError if sampling is not linear in eps or v."""
    config = dict(scheduler_config)
    name = config.get("_class_name", "DDIMScheduler")
    if name not in {"DDIMScheduler", *DDIMScheduler._compatibles} - {"EDMEulerScheduler"}:
        raise ValueError(f"{name} has no DDIM equivalent: expected DDIM, PNDM, DDPM or alike")
    if config.get("thresholding") or config.get("clip_sample"):
        culprit = "thresholding" if config.get("thresholding") else "clip_sample"
        raise ValueError(f"the scheduler sets {culprit}, which makes sampling nonlinear: set it to false")
    # DDIM clips unless told otherwise, and the other schedulers' configurations do not say.
    config["clip_sample"] = False
    scheduler = DDIMScheduler.from_config(config)
    if scheduler.config.prediction_type not in _STEPS:
        found = scheduler.config.prediction_type
        raise ValueError(f"prediction_type {found!r} is not supported: expected one of {sorted(_STEPS)}")
    return scheduler
