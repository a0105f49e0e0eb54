"""One step of any scheduler as a weighted sum. A one-step student of another method is TiUE with N = 1.

A scheduler starts from x_T = s_0 z_T, shows the network u = x_T / c, and makes one step to z_0. In the coordinates of
u, the step is DDIM's (eq. 12 of arXiv 2010.02502) from abar to abar', whatever the scheduler is called. Hence

    u = k z_T,    z_0 = c_skip u + c_out (a u + b F(u, t)) = w_0 z_T + w_1 F(k z_T, t),
    k = s_0 / c,  w_0 = k (c_skip + c_out a),  w_1 = c_out b,

with DDIM's a and b (see `schedule`) for a network F that predicts eps or v. The schedulers differ in four numbers:

    scheduler                          k                        abar'               c_skip, c_out
    DDIM, PNDM, DDPM, TCD              1                        `_LANDINGS`         0, 1
    DPM-Solver, UniPC, DEIS            1                        1 / (1 + sigma'^2)  0, 1
    Euler, Euler ancestral, Heun, LMS  s_0 / sqrt(1 + sigma^2)  1 / (1 + sigma'^2)  0, sqrt(1 + sigma'^2)
    LCM                                1                        1                   `_boundary_conditions`

sigma^2 = 1 / abar - 1 (arXiv 2206.00364), and sigma' is that of the landing. Timesteps, sigmas and landings are read
from the scheduler of diffusers. Afterwards, the sum is compared with that scheduler's own step. So an option that is
not understood here leads to an error, and never to another picture.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from math import sqrt
from typing import Any

import diffusers
import torch

from tiue.files import one_line, shortened
from tiue.schedule import NoiseSchedule, Schedule, ddim_step, ignored_options

_AGREEMENT = 1e-5  # of the sum with the scheduler's step, which is computed in float32; relative to its factors

# abar' of schedulers without sigmas.
_LANDINGS: dict[str, Callable[[Any], float]] = {
    "DDIMScheduler": lambda scheduler: float(scheduler.final_alpha_cumprod),
    "PNDMScheduler": lambda scheduler: float(scheduler.final_alpha_cumprod),
    "TCDScheduler": lambda scheduler: float(scheduler.alphas_cumprod[0]),
    "DDPMScheduler": lambda _: 1.0,
    "LCMScheduler": lambda _: 1.0,
}
_WITH_SIGMAS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
_SCALED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler")
# Schedulers that draw noise if they make more than one step, and options that choose other timesteps than DDIM's.
_STOCHASTIC = ("Ancestral", "LCM", "TCD", "SDE", "SASolver")
_OTHER_TIMESTEPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
SUPPORTED = (*_LANDINGS, *_WITH_SIGMAS, *_SCALED)


@dataclass(frozen=True)
class SchedulerChoice:
    """How a one-step student makes its step, where its pipeline does not say so."""

    name: str | None = None  # the class to use in place of the pipeline's, with the pipeline's configuration
    timestep: int | None = None  # the only timestep, in place of the scheduler's
    guidance: float | None = None  # of a UNet that takes a guidance scale as an input


@dataclass(frozen=True)
class OneStep:
    """One step of a scheduler: z_0 = w_0 z_T + w_1 F(k z_T, t)."""

    scheduler: str  # its class
    schedule: Schedule  # t, w_0, w_1
    input_scale: float  # k
    abar: float  # at t; the share of the picture in what the model was trained on there


def one_step(scheduler_config: Mapping[str, Any], choice: SchedulerChoice | None = None) -> OneStep:
    """Compute what diffusers' scheduler does with num_inference_steps=1.

    Args:
        scheduler_config: of the pipeline.
        choice: the class and the timestep, if they are not the configuration's own.

    Raises:
        ValueError: the class is not supported, its step is not a fixed weighted sum, or the timestep does not fit.
    """
    choice = choice or SchedulerChoice()
    noise = NoiseSchedule.from_config(scheduler_config)
    trained = len(noise.abar)
    if choice.timestep is not None and not 0 <= choice.timestep < trained:
        raise ValueError(f"`timesteps` {choice.timestep}: expected one of 0 to {trained - 1}")
    name = str(scheduler_config.get("_class_name", "DDIMScheduler"))
    if choice.name is not None:  # Classes clip by default. Given to StableDiffusionPipeline, they do not.
        name, scheduler_config = choice.name, {"clip_sample": False, **scheduler_config}
    make = _maker(name, scheduler_config, choice.timestep)
    scheduler = make()
    if clipping := ignored_options(scheduler.config):
        raise ValueError(f"{name} clips its one step ({' and '.join(clipping)}): a weighted sum cannot clip")
    t = float(scheduler.timesteps[0])
    if not t.is_integer() or not 0 <= t < trained:
        raise ValueError(f"{name} makes its one step at timestep {t}: expected a whole number from 0 to {trained - 1}")
    found = _closed_form(name, scheduler, noise.prediction_type, int(t))
    _check_against(make, found)
    return found


def check_several_steps(scheduler_config: Mapping[str, Any]) -> None:
    """Raise ValueError for a scheduler of several steps that is nothing like DDIM, as which a student is exported.

    DDPMScheduler passes, although it draws noise. Programs that train models save it for its noise process alone.
    """
    name = str(scheduler_config.get("_class_name", "DDIMScheduler"))
    options = [option for option in _OTHER_TIMESTEPS if scheduler_config.get(option)]
    if not isinstance(getattr(diffusers, name, None), type):
        problem = f"{shortened(name)} is not a scheduler of diffusers"
    elif any(word in name for word in _STOCHASTIC) or str(scheduler_config.get("algorithm_type")).startswith("sde"):
        problem = f"{name} draws noise at every step"
    elif options:
        problem = f"{name} has {' and '.join(options)}, so its timesteps are not DDIM's"
    else:
        return
    raise ValueError(
        f"{problem}: a one-step student of another method needs `steps` 1, and a TiUE student of several steps needs a "
        "DDIMScheduler"
    )


def _closed_form(name: str, scheduler: Any, prediction_type: str, t: int) -> OneStep:
    k, c_skip, c_out = 1.0, 0.0, 1.0
    if name in _LANDINGS:
        abar, landing = float(scheduler.alphas_cumprod[t]), _LANDINGS[name](scheduler)
    else:
        sigma, last = (float(sigma) for sigma in scheduler.sigmas[:2])
        abar, landing = 1 / (1 + sigma**2), 1 / (1 + last**2)
        if name in _SCALED:
            k, c_out = float(scheduler.init_noise_sigma) / sqrt(1 + sigma**2), sqrt(1 + last**2)
    if name == "LCMScheduler":
        c_skip, c_out = _boundary_conditions(scheduler.config.timestep_scaling * t)
    a, b = ddim_step(prediction_type, t, abar, landing)
    return OneStep(name, Schedule((t,), k * (c_skip + c_out * a), (c_out * b,)), k, abar)


def _boundary_conditions(scaled_t: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """Return c_skip and c_out of a latent consistency model (arXiv 2310.04378) at its scaled timestep."""
    square = scaled_t**2 + sigma_data**2
    return sigma_data**2 / square, scaled_t / sqrt(square)


def _maker(name: str, scheduler_config: Mapping[str, Any], timestep: int | None) -> Callable[[], Any]:
    """Return a function that makes the scheduler, set to its one step."""
    if name not in SUPPORTED:
        known = ", ".join(supported.removesuffix("Scheduler") for supported in SUPPORTED)
        raise ValueError(f"one step of {shortened(name)} is not supported: expected the Scheduler of {known}")
    cls = getattr(diffusers, name)
    accepted = signature(cls.__init__).parameters
    config = {key: value for key, value in scheduler_config.items() if key in accepted}
    has_sigmas = name not in _LANDINGS
    if has_sigmas and timestep is not None and "timesteps" not in signature(cls.set_timesteps).parameters:
        raise ValueError(f"{name} takes no `timesteps`: choose another `scheduler`, such as EulerDiscreteScheduler")

    def make() -> Any:
        with _errors_of(name):
            scheduler: Any = cls(**config)
            if has_sigmas and timestep is not None:
                scheduler.set_timesteps(timesteps=[timestep])
            else:
                scheduler.set_timesteps(1)
                if timestep is not None:  # Not all of these classes have the argument. Their steps need no more.
                    scheduler.timesteps = torch.tensor([timestep], device="cpu")
        if len(scheduler.timesteps) != 1:
            raise ValueError(f"{name} calls the network {len(scheduler.timesteps)} times in its one step")
        return scheduler

    return make


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Turn a scheduler's errors into ValueErrors of one line, and hide its warnings, which are for its authors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:  # Schedulers raise anything for configurations that make no sense.
            raise ValueError(f"{name} cannot make one step: {one_line(error)}") from error


def _check_against(make: Callable[[], Any], found: OneStep) -> None:
    """Raise ValueError unless the scheduler's own step is the weighted sum, whatever noise and prediction are."""
    z_T, prediction = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    w_0, w_1 = found.schedule.noise_weight, found.schedule.step_weights[0]
    expected = found.input_scale * z_T, w_0 * z_T + w_1 * prediction
    with _errors_of(found.scheduler):
        made, again = (_run(make(), z_T, prediction, seed) for seed in (1, 2))
    limit = _AGREEMENT * (1 + abs(w_0) + abs(w_1) + float(make().init_noise_sigma))
    if not torch.allclose(made[1], again[1], rtol=0, atol=limit, equal_nan=True):
        raise ValueError(f"{found.scheduler} draws noise in its one step: a weighted sum has no noise but z_T")
    if not all(torch.allclose(one, other, rtol=0, atol=limit) for one, other in zip(made, expected, strict=True)):
        raise ValueError(
            f"{found.scheduler} has options with which its one step is not the supported weighted sum: remove them, or "
            "choose another `scheduler`"
        )


def _run(scheduler: Any, z_T: torch.Tensor, prediction: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the network's input u and z_0, as StableDiffusionPipeline computes them."""
    t, x_T = scheduler.timesteps[0], z_T * scheduler.init_noise_sigma
    arguments = {"generator": torch.Generator("cpu").manual_seed(seed), "eta": 0.0}
    accepted = signature(scheduler.step).parameters
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    u = scheduler.scale_model_input(x_T, t)
    return u, scheduler.step(prediction, t, x_T, **arguments, return_dict=False)[0]
