"""DDIM as a weighted sum: the timesteps of a schedule and the weights that turn predictions into an image.

With eta = 0 and no clipping, a DDIM step is linear, z <- a_i z + b_i eps_i. All N steps are therefore

    z_0 = w_0 z_T + sum_i w_i eps_i,    w_0 = prod_j a_j,    w_i = b_i prod_{j>i} a_j,

and nothing at run time needs a scheduler. Where the network predicts v instead of eps the step is linear in v
just the same, and the weights multiply v.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
from diffusers import DDIMScheduler

_CLIPPING = ("clip_sample", "thresholding")  # scheduler options that make a step nonlinear


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

    Any scheduler's configuration will do that has betas (PNDM, DDPM, Euler, UniPC ...): they, the spacing and the
    offset are read from it.
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

    Weights are computed in float64. A configuration's clipping has no place in a sum: see `ignored_options`.
    Raises ValueError if the timesteps do not fit the scheduler, or the scheduler not DDIM (see `_ddim`).
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


def ignored_options(scheduler_config: Mapping[str, Any]) -> list[str]:
    """The options of a configuration that clip a sampler's steps, which are therefore left out here.

    Stable Diffusion is sampled without them: diffusers' own pipeline sets clip_sample to false.
    """
    return [option for option in _CLIPPING if scheduler_config.get(option)]


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


_BETAS = ("beta_start", "beta_end", "beta_schedule")
# Their processes are others, even where a configuration still has the betas of the one it was made from.
_WITHOUT_BETAS = ("FlowMatch", "EDM", "CogVideoX")


def _ddim(scheduler_config: Mapping[str, Any]) -> DDIMScheduler:
    """DDIMScheduler with the betas, spacing and offset of any scheduler's configuration, and without clipping.

    What is not given is as DDIMScheduler has it. Raises ValueError if there are no betas, or if the network
    predicts something that DDIM is not linear in.
    """
    name = scheduler_config.get("_class_name", "DDIMScheduler")
    own_betas = scheduler_config.get("trained_betas")
    if name.startswith(_WITHOUT_BETAS) or scheduler_config.get("use_flow_sigmas"):
        raise ValueError(
            f"{name} has no DDIM equivalent: expected a scheduler with betas (DDIM, PNDM, DDPM, Euler ...)"
        )
    absent = [key for key in _BETAS if scheduler_config.get(key) is None]
    if absent and own_betas is None:
        raise ValueError(f"{name} has no DDIM equivalent: its configuration has no {absent[0]}")
    accepted = signature(DDIMScheduler.__init__).parameters
    config = {key: value for key, value in scheduler_config.items() if key in accepted}
    try:
        scheduler = DDIMScheduler(**config | dict.fromkeys(_CLIPPING, False))
    except NotImplementedError as error:
        expected = "linear, scaled_linear or squaredcos_cap_v2"
        raise ValueError(f"beta_schedule {config['beta_schedule']!r} is not supported: expected {expected}") from error
    trained, betas = scheduler.config.num_train_timesteps, len(scheduler.betas)
    if trained != betas:
        raise ValueError(f"the scheduler has {betas} trained_betas for {trained} num_train_timesteps")
    if scheduler.config.prediction_type not in _STEPS:
        found = scheduler.config.prediction_type
        raise ValueError(f"prediction_type {found!r} is not supported: expected one of {sorted(_STEPS)}")
    return scheduler
