"""DDIM as a weighted sum: the timesteps of a schedule and the weights that turn predictions into an image.

With eta = 0 and no clipping, a DDIM step is linear, z <- a_i z + b_i eps_i. All N steps are therefore

    z_0 = w_0 z_T + sum_i w_i eps_i,    w_0 = prod_j a_j,    w_i = b_i prod_{j>i} a_j,

and nothing at run time needs a scheduler. If the network predicts v instead of eps, the step is linear in v, and the
weights multiply v.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

from tiue.files import one_line

_CLIPPING = ("clip_sample", "thresholding")  # scheduler options that make a step nonlinear
_BETAS = ("beta_start", "beta_end", "beta_schedule")
_MOST_TIMESTEPS = 100_000  # limit of training timesteps; models have 1000
# Schedulers of other noise processes. Some of their configurations still hold betas of an earlier scheduler.
_WITHOUT_BETAS = ("FlowMatch", "EDM", "CogVideoX")


@dataclass(frozen=True)
class Schedule:
    """The decoder's timesteps, and the weights of the sum z_0 = w_0 z_T + sum_i w_i eps_i."""

    timesteps: tuple[int, ...]  # t_1 > ... > t_N
    noise_weight: float  # w_0
    step_weights: tuple[float, ...]  # w_1 ... w_N


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise process of a model's training, and the timesteps of DDIM on it."""

    abar: tuple[float, ...]  # alphas_cumprod of every training timestep
    final_abar: float  # abar after the last step
    prediction_type: str  # "epsilon" or "v_prediction"
    spacing: str  # "leading", "trailing" or "linspace"
    steps_offset: int  # added to "leading" timesteps

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> "NoiseSchedule":
        """Read the configuration of any scheduler with betas (DDIM, PNDM, DDPM, Euler, UniPC ...).

        Missing options take the defaults of DDIMScheduler. A sum cannot clip: see `ignored_options`.

        Raises:
            ValueError: the scheduler has no betas, or DDIM is not linear in its network's prediction.
        """
        try:
            content = json.dumps(dict(scheduler_config), sort_keys=True, default=list)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the scheduler's configuration is not JSON: {one_line(error)}") from error
        return _read(content)

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """abar_t of every training timestep, float64 (T,)."""
        return torch.tensor(self.abar, dtype=torch.float64, device="cpu")  # The default device may be "meta".

    def timesteps(self, steps: int) -> list[int]:
        """Return the `steps` descending timesteps of diffusers' DDIMScheduler.

        Raises:
            ValueError: `steps` is not between 1 and the number of training timesteps.
        """
        trained = len(self.abar)
        if not 1 <= steps <= trained:
            raise ValueError(f"steps must be between 1 and {trained}, got {steps}")
        if self.spacing == "leading":
            return [i * (trained // steps) + self.steps_offset for i in reversed(range(steps))]
        if self.spacing == "trailing":
            return [int(t) - 1 for t in np.round(np.arange(trained, 0, -trained / steps))]
        return [int(t) for t in np.linspace(0, trained - 1, steps).round()[::-1]]

    def closed_form(self, steps: int | Sequence[int]) -> Schedule:
        """Compute the schedule of `steps` in float64.

        Args:
            steps: a number of DDIM steps, or the descending timesteps themselves.

        Raises:
            ValueError: the timesteps do not fit the scheduler.
        """
        timesteps = self.timesteps(steps) if isinstance(steps, int) else [int(t) for t in steps]
        trained = len(self.abar)
        if not timesteps or any(not 0 <= t < trained for t in timesteps):
            raise ValueError(f"timesteps must lie in 0..{trained - 1}, got {timesteps}")
        if any(later >= t for t, later in pairwise(timesteps)):
            raise ValueError(f"timesteps must be descending, got {timesteps}")
        noise_weight, step_weights = 1.0, []
        for a, b in self.ddim_steps(timesteps):
            noise_weight *= a
            step_weights = [w * a for w in step_weights] + [b]
        return Schedule(tuple(timesteps), noise_weight, tuple(step_weights))

    def ddim_steps(self, timesteps: Sequence[int]) -> list[tuple[float, float]]:
        """Return a_i and b_i of every step z <- a_i z + b_i eps_i (or v_i), for descending timesteps."""
        coefficients: list[tuple[float, float]] = []
        for t, previous in zip(timesteps, self._arrivals(list(timesteps)), strict=True):
            landing = self.abar[previous] if previous >= 0 else self.final_abar
            coefficients.append(ddim_step(self.prediction_type, t, self.abar[t], landing))
        return coefficients

    def _arrivals(self, timesteps: list[int]) -> list[int]:
        """Return the timestep that each step lands on. A negative one is the end of the chain.

        DDIMScheduler lands T // N below t_i. With "linspace" spacing, and with "trailing" if N does not divide T, this
        is not t_{i+1}. The same is done here, so that a student samples like its teacher. With timesteps that are not
        DDIM's own, a step lands on the next timestep.
        """
        if timesteps == self.timesteps(len(timesteps)):
            stride = len(self.abar) // len(timesteps)
            return [t - stride for t in timesteps]
        return [*timesteps[1:], -1]


def alphas_cumprod(scheduler_config: Mapping[str, Any]) -> torch.Tensor:
    """Return abar_t of every training timestep, float64 (T,). Raises ValueError as `NoiseSchedule.from_config`."""
    return NoiseSchedule.from_config(scheduler_config).alphas_cumprod


def ddim_timesteps(scheduler_config: Mapping[str, Any], steps: int) -> list[int]:
    """Return `NoiseSchedule.timesteps` of a configuration."""
    return NoiseSchedule.from_config(scheduler_config).timesteps(steps)


def closed_form(scheduler_config: Mapping[str, Any], steps: int | Sequence[int]) -> Schedule:
    """Return `NoiseSchedule.closed_form` of a configuration."""
    return NoiseSchedule.from_config(scheduler_config).closed_form(steps)


def ddim_step(prediction_type: str, t: int, abar: float, abar_next: float) -> tuple[float, float]:
    """Return a and b of DDIM's step z <- a z + b eps (or v) from abar to abar_next. t: for the message.

    Raises:
        ValueError: the step divides by zero.
    """
    if abar == 0.0 and prediction_type == "epsilon":
        raise ValueError(f"epsilon prediction says nothing at timestep {t}: zero terminal SNR needs v")
    return _STEPS[prediction_type](abar, abar_next)


def ignored_options(scheduler_config: Mapping[str, Any]) -> list[str]:
    """Return the options of a configuration that clip a sampler's steps. The closed form ignores them.

    Stable Diffusion is sampled without clipping: diffusers' own pipeline sets clip_sample to false.
    """
    return [option for option in _CLIPPING if scheduler_config.get(option)]


def _epsilon_step(abar: float, abar_next: float) -> tuple[float, float]:
    """Return a and b of DDIM's step z <- a z + b eps: eq. 12 of arXiv 2010.02502 with sigma = 0."""
    a = sqrt(abar_next / abar)
    return a, sqrt(1 - abar_next) - a * sqrt(1 - abar)


def _v_step(abar: float, abar_next: float) -> tuple[float, float]:
    """Return the same for v: x_0 = sqrt(abar) z - sqrt(1-abar) v and eps = sqrt(abar) v + sqrt(1-abar) z."""
    a = sqrt(abar_next * abar) + sqrt((1 - abar_next) * (1 - abar))
    return a, sqrt((1 - abar_next) * abar) - sqrt(abar_next * (1 - abar))


def _check_numbers(scheduler_config: Mapping[str, Any]) -> None:
    """Raise ValueError for numbers from which no scheduler can be built, or only one that takes all memory."""
    trained, betas = scheduler_config.get("num_train_timesteps", 1000), scheduler_config.get("trained_betas")
    if type(trained) is not int or not 1 <= trained <= _MOST_TIMESTEPS:
        expected = f"a whole number from 1 to {_MOST_TIMESTEPS:,}"
        raise ValueError(f"num_train_timesteps: expected {expected}, got {one_line(repr(trained), 100)}")
    for name in ("beta_start", "beta_end"):
        value = scheduler_config.get(name, 0.0)
        if betas is None and not (type(value) in (int, float) and 0 <= value <= 1):
            raise ValueError(f"{name}: expected a number from 0 to 1, got {one_line(repr(value), 100)}")


_STEPS = {"epsilon": _epsilon_step, "v_prediction": _v_step}
_SPACINGS = ("leading", "trailing", "linspace")


@lru_cache(maxsize=16)  # Building a scheduler takes milliseconds, and is needed often.
def _read(scheduler_config: str) -> NoiseSchedule:
    scheduler = _ddim(json.loads(scheduler_config))
    config = scheduler.config
    return NoiseSchedule(
        # diffusers computes these values in float32. The teacher was trained with them, so they are kept.
        abar=tuple(scheduler.alphas_cumprod.double().tolist()),
        final_abar=float(scheduler.final_alpha_cumprod),
        prediction_type=config.prediction_type,
        spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
    )


def _ddim(scheduler_config: Mapping[str, Any]) -> DDIMScheduler:
    """Make a DDIMScheduler, without clipping, from any scheduler's configuration. Raises ValueError."""
    name = str(scheduler_config.get("_class_name", "DDIMScheduler"))
    if name.startswith(_WITHOUT_BETAS) or scheduler_config.get("use_flow_sigmas"):
        raise ValueError(
            f"{name} has no DDIM equivalent: expected a scheduler with betas (DDIM, PNDM, DDPM, Euler ...)"
        )
    absent = [key for key in _BETAS if scheduler_config.get(key) is None]
    if absent and scheduler_config.get("trained_betas") is None:
        raise ValueError(f"{name} has no DDIM equivalent: its configuration has no {absent[0]}")
    _check_numbers(scheduler_config)
    accepted = signature(DDIMScheduler.__init__).parameters
    config = {key: value for key, value in scheduler_config.items() if key in accepted}
    try:
        scheduler = DDIMScheduler(**config | dict.fromkeys(_CLIPPING, False))
    except NotImplementedError as error:
        expected = "linear, scaled_linear or squaredcos_cap_v2"
        raise ValueError(f"beta_schedule {config['beta_schedule']!r} is not supported: expected {expected}") from error
    except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{name} has a malformed configuration: {one_line(error, 100)}") from error
    abar = scheduler.alphas_cumprod
    if not bool(((abar >= 0) & (abar <= 1)).all()):  # This is also false for NaN.
        raise ValueError(f"{name} has a malformed configuration: its betas make no noise process")
    trained, betas = scheduler.config.num_train_timesteps, len(scheduler.betas)
    if trained != betas:
        raise ValueError(f"the scheduler has {betas} trained_betas for {trained} num_train_timesteps")
    if scheduler.config.prediction_type not in _STEPS:
        found = scheduler.config.prediction_type
        raise ValueError(f"prediction_type {found!r} is not supported: expected one of {sorted(_STEPS)}")
    if type(scheduler.config.steps_offset) is not int:
        raise ValueError(f"steps_offset: expected a whole number, got {scheduler.config.steps_offset!r:.100}")
    if scheduler.config.timestep_spacing not in _SPACINGS:
        found = scheduler.config.timestep_spacing
        raise ValueError(f"timestep_spacing {found!r} is not supported: expected one of {sorted(_SPACINGS)}")
    return scheduler
