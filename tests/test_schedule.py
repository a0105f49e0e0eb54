import itertools

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from tolerances import REORDERED

from tiue.schedule import alphas_cumprod, closed_form, ddim_timesteps

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


def test_zero_terminal_snr_works_for_v_and_is_refused_for_epsilon():
    zero = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    assert closed_form(config("v_prediction", **zero), 4).timesteps[0] == 999
    with pytest.raises(ValueError, match="zero terminal SNR"):
        closed_form(config("epsilon", **zero), 4)


def test_stable_diffusion_steps():
    assert ddim_timesteps(config(), 4) == [751, 501, 251, 1]
    assert ddim_timesteps(config(), 1) == [1]


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_other_schedulers_of_the_family_give_the_same(name):
    other = {key: value for key, value in config().items() if key != "clip_sample"} | {"_class_name": name}
    assert closed_form(other, 4) == closed_form(config(), 4)


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
        ({"thresholding": True}, 4, "thresholding"),
        ({"clip_sample": True}, 4, "clip_sample"),
        ({"prediction_type": "sample"}, 4, "'sample' is not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 4, "FlowMatchEulerDiscreteScheduler"),
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
