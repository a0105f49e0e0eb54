import itertools
import json

import diffusers
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from tolerances import REORDERED

from tiue.schedule import NoiseSchedule, alphas_cumprod, closed_form, ddim_timesteps, ignored_options

KINDS = list(itertools.product(("epsilon", "v_prediction"), ("leading", "trailing", "linspace"), (False, True)))


def config(prediction_type="epsilon", timestep_spacing="leading", set_alpha_to_one=False, **changes):
    return tiny.SCHEDULER | {
        "prediction_type": prediction_type,
        "timestep_spacing": timestep_spacing,
        "set_alpha_to_one": set_alpha_to_one,
        **changes,
    }


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_sum_is_what_ddim_computes_step_by_step(kind, steps):
    scheduler = DDIMScheduler.from_config(config(*kind))
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(steps)
    z_T, eps = torch.randn(3, 5, generator=draw), torch.randn(steps, 3, 5, generator=draw)
    z = z_T.double()
    for t, e in zip(scheduler.timesteps, eps, strict=True):
        z = scheduler.step(e.double(), t, z, eta=0.0).prev_sample

    schedule = closed_form(config(*kind), steps)

    assert list(schedule.timesteps) == scheduler.timesteps.tolist()
    summed = schedule.noise_weight * z_T + sum(w * e for w, e in zip(schedule.step_weights, eps, strict=True))
    torch.testing.assert_close(summed, z.float(), atol=REORDERED, rtol=REORDERED)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers_for_every_number_of_steps(spacing, offset):
    options = config(timestep_spacing=spacing, steps_offset=offset)
    scheduler, own = DDIMScheduler.from_config(options), NoiseSchedule.from_config(options)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        assert own.timesteps(steps) == scheduler.timesteps.tolist()


def test_zero_terminal_snr_works_for_v_and_is_refused_for_epsilon():
    zero = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    assert closed_form(config("v_prediction", **zero), 4).timesteps[0] == 999
    with pytest.raises(ValueError, match="zero terminal SNR"):
        closed_form(config("epsilon", **zero), 4)


def test_stable_diffusion_steps():
    assert ddim_timesteps(config(), 4) == [751, 501, 251, 1]
    assert ddim_timesteps(config(), 1) == [1]


@pytest.mark.parametrize(
    "cls",
    [
        diffusers.PNDMScheduler,
        diffusers.DDPMScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.LCMScheduler,
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_other_schedulers_give_the_same(cls, prediction_type, tmp_path):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = cls(**betas, steps_offset=1, timestep_spacing="leading", prediction_type=prediction_type)
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert torch.equal(alphas_cumprod(saved).float(), scheduler.alphas_cumprod)
    last = saved.get("set_alpha_to_one", True)  # most have no such option, and end at an abar of one
    assert closed_form(saved, 4) == closed_form(config(prediction_type, set_alpha_to_one=last), 4)
    assert closed_form(saved, 4).timesteps == (751, 501, 251, 1)


def test_trained_betas():
    betas = torch.linspace(0.001, 0.01, 1000).tolist()
    own = {"_class_name": "DDPMScheduler", "trained_betas": betas, "num_train_timesteps": 1000}
    assert alphas_cumprod(own)[1].item() == pytest.approx((1 - betas[0]) * (1 - betas[1]))


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_clipping_is_left_out_and_named(option):
    assert closed_form(config(**{option: True}), 4) == closed_form(config(), 4)
    assert ignored_options(config(**{option: True})) == [option]
    assert ignored_options(config()) == []


def test_timesteps_may_be_given():
    assert closed_form(config(), [751, 501, 251, 1]) == closed_form(config(), 4)
    abar = alphas_cumprod(config()).tolist()
    own = closed_form(config(), [900, 300])
    assert own.timesteps == (900, 300)
    assert own.noise_weight == pytest.approx((abar[0] / abar[900]) ** 0.5)


def test_alphas_are_those_of_diffusers():
    abar = alphas_cumprod(config())
    assert abar.dtype == torch.float64
    assert torch.equal(abar.float(), DDIMScheduler.from_config(config()).alphas_cumprod)


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({"prediction_type": "sample"}, 4, "'sample' is not supported"),
        ({"prediction_type": "flow_prediction"}, 4, "'flow_prediction' is not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 4, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, 4, "EDMEulerScheduler has no DDIM equivalent"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, 4, "UniPCMultistepScheduler has no DDIM"),
        ({"beta_start": None}, 4, "no beta_start"),
        ({"beta_start": "small"}, 4, "beta_start: expected a number"),
        ({"steps_offset": "1"}, 4, "steps_offset: expected a whole number"),
        ({"own": object()}, 4, "configuration is not JSON"),
        ({"timestep_spacing": "karras"}, 4, "timestep_spacing 'karras' is not supported"),
        ({"beta_schedule": "sigmoid"}, 4, "beta_schedule 'sigmoid' is not supported"),
        ({"trained_betas": [0.1, 0.2]}, 4, "2 trained_betas for 1000"),
        ({}, 0, "between 1 and 1000"),
        ({}, 1001, "between 1 and 1000"),
        ({}, [], "must lie in"),
        ({}, [1000, 1], "must lie in"),
        ({}, [1, 501], "descending"),
    ],
)
def test_what_cannot_be_is_refused(changes, steps, message):
    with pytest.raises(ValueError, match=message):
        closed_form(config(**changes), steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps: expected a whole number from 1 to 100,000, got 0"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps: .* got 1000000000"),
        ({"num_train_timesteps": True}, "num_train_timesteps: .* got True"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps: .* got '1000'"),
        ({"num_train_timesteps": 1e3}, r"num_train_timesteps: .* got 1000\.0"),
        ({"beta_start": float("nan")}, "beta_start: expected a number from 0 to 1, got nan"),
        ({"beta_start": -0.1}, "beta_start: "),
        ({"beta_end": 1e308}, "beta_end: "),
        ({"beta_end": "0.1"}, "beta_end: "),
        ({"beta_end": [0.1]}, "beta_end: "),
        ({"trained_betas": [float("nan")] * 1000}, "its betas make no noise process"),
        ({"trained_betas": [-1.0] * 1000}, "its betas make no noise process"),
        ({"trained_betas": [None] * 1000}, "malformed"),
        ({"trained_betas": []}, "malformed|0 trained_betas"),
        ({"trained_betas": {}}, "malformed|0 trained_betas"),
    ],
)
def test_numbers_that_make_no_noise_process_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        NoiseSchedule.from_config(tiny.SCHEDULER | changes)
    assert "\n" not in str(refused.value)
