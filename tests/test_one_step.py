"""One-step students of other methods: the same pictures as diffusers' own pipelines make with num_inference_steps=1."""

import itertools
import json
import logging
from copy import deepcopy
from dataclasses import replace
from math import sqrt

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from tiue_runtime import Pipeline, bundle
from tolerances import AMPLIFIED, GOLDEN_IMAGE_LEVELS, ZERO_SNR

from benchmarks.pipelines import write_pipeline
from export.errors import ExportError
from export.lora import Lora
from export.onnx import main
from export.source import load_source
from tiue.checkpoint import CheckpointError, Student, check_savable, save_student
from tiue.components import ComponentsError, load_components
from tiue.fold import fold_guidance, fold_input_scale
from tiue.one_step import SUPPORTED, OneStep, SchedulerChoice, check_several_steps, one_step
from tiue.schedule import alphas_cumprod
from tiue.text_encoder import encode_text

# SD-Turbo's noise process. diffusers has nothing to repair in it.
SCHEDULER = tiny.SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
PREDICTIONS, SPACINGS = ("epsilon", "v_prediction"), ("leading", "trailing", "linspace")
PROMPTS = ["a red heart", "a cat"]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
LITTLE_NOISE = "ignore:.*almost no noise to remove"
ABAR = alphas_cumprod(SCHEDULER).tolist()
SIGMA = sqrt(1 / ABAR[999] - 1)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Silence diffusers' advice on timesteps that a model was not trained for, and on a missing safety checker."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "level", logging.ERROR)


def scheduler_of(config):
    config = {"skip_prk_steps": True} | config
    cls = getattr(diffusers, config["_class_name"])
    return cls.from_config({name: value for name, value in config.items() if name in cls._get_init_keys(cls)})


def pipeline_of(components, config, cls=StableDiffusionPipeline):
    pipe = cls(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=components.unet,
        scheduler=scheduler_of(config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model():
    """A model, its pipeline of diffusers, noise (2, 4, 8, 8) and text."""
    components = tiny.sd15()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return components, pipeline_of(components, SCHEDULER), noise, encode_text(components, PROMPTS)


def theirs(model, config, **arguments):
    """Latents of diffusers' pipeline."""
    _, pipe, noise, text = model
    pipe.scheduler = scheduler_of(config)
    given = {"num_inference_steps": 1} | arguments
    return pipe(prompt_embeds=text, guidance_scale=0, latents=noise.clone(), output_type="latent", **given).images


@torch.no_grad()
def ours(model, config, choice=None):
    """Latents of the student."""
    components, _, noise, text = model
    step = one_step({"skip_prk_steps": True} | config, choice)
    unet = deepcopy(components.unet)
    fold_input_scale(unet, step.input_scale)
    timesteps = list(step.schedule.timesteps)
    student = Student(replace(components, unet=unet), timesteps[0], {1: timesteps}, one_step=step)
    return student.tiue()(noise, text)


def assert_same(made, expected, limit=AMPLIFIED):
    difference = ((made - expected).abs().max() / expected.std()).item()
    assert difference <= limit, f"{difference:.1e} of std"


# Against diffusers' own pipeline.


@pytest.mark.parametrize("name", SUPPORTED)
def test_one_step_is_that_of_diffusers_pipeline(model, name):
    for prediction, spacing in itertools.product(PREDICTIONS, SPACINGS):
        for to_one in (True, False) if name in ("DDIMScheduler", "PNDMScheduler") else (True,):
            config = SCHEDULER | {"_class_name": name, "prediction_type": prediction, "timestep_spacing": spacing}
            config |= {"set_alpha_to_one": to_one}
            assert_same(ours(model, config), theirs(model, config))


OPTIONS = [
    {"steps_offset": 0},
    {"beta_schedule": "linear"},
    {"trained_betas": torch.linspace(0.001, 0.01, 1000).tolist()},
    {"num_train_timesteps": 500},
    {"original_inference_steps": 40},
    {"timestep_scaling": 1.0},
    {"final_sigmas_type": "sigma_min"},
    {"interpolation_type": "log_linear"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_lu_lambdas": True},
    {"algorithm_type": "sde-dpmsolver++"},
    {"solver_order": 3},
    {"variance_type": "fixed_small_log"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
def test_options_change_the_step_as_in_diffusers_or_are_refused(model, options):
    exact = 0
    for name in SUPPORTED:
        config = SCHEDULER | {"_class_name": name} | options
        try:
            made = ours(model, config)
        except ValueError:
            continue  # Fail closed. The refusals that people meet are tested by their messages.
        # At sigma = 4096, schedulers with sigmas round z_0 to multiples of 2^-11.
        limit = ZERO_SNR if "rescale_betas_zero_snr" in options else AMPLIFIED
        assert_same(made, theirs(model, config), limit)
        exact += 1
    assert exact >= len(SUPPORTED) - 2


@pytest.mark.parametrize("t", [399, 800, 999])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "name", ["LCMScheduler", "TCDScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_a_timestep_may_be_given_as_in_diffusers(model, name, prediction, t):
    config = SCHEDULER | {"_class_name": name, "prediction_type": prediction}
    expected = theirs(model, config, num_inference_steps=None, timesteps=[t])
    assert_same(ours(model, config, SchedulerChoice(timestep=t)), expected)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "DDPMScheduler"])
def test_a_scheduler_may_be_chosen_as_in_diffusers(model, name):
    pndm = SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "timestep_spacing": "leading"}
    chosen = getattr(diffusers, name).from_config(diffusers.PNDMScheduler.from_config(pndm).config)
    expected = theirs(model, dict(chosen.config) | {"_class_name": name}, eta=1.0)  # Hyper-SD says eta=1.
    assert_same(ours(model, pndm, SchedulerChoice(name=name)), expected)


# Closed forms.


def weights(name, prediction, **options):
    step = one_step(SCHEDULER | {"_class_name": name, "prediction_type": prediction} | options)
    return step.input_scale, step.schedule.noise_weight, *step.schedule.step_weights


def test_the_weights_of_euler():
    k = SIGMA / sqrt(SIGMA**2 + 1)
    assert weights("EulerDiscreteScheduler", "epsilon") == pytest.approx((k, SIGMA, -SIGMA))
    assert weights("EulerDiscreteScheduler", "v_prediction") == pytest.approx((k, SIGMA / (SIGMA**2 + 1), -k))


def test_the_weights_of_the_plain_x_0():
    alpha, noise = sqrt(ABAR[999]), sqrt(1 - ABAR[999])
    assert weights("DDPMScheduler", "epsilon") == pytest.approx((1, 1 / alpha, -noise / alpha))
    assert weights("DDPMScheduler", "v_prediction") == pytest.approx((1, alpha, -noise))


def test_the_weights_of_a_latent_consistency_model():
    alpha, noise = sqrt(ABAR[999]), sqrt(1 - ABAR[999])
    skip, out = 0.25 / (9990**2 + 0.25), 9990 / sqrt(9990**2 + 0.25)
    expected = 1, skip + out / alpha, -out * noise / alpha
    assert weights("LCMScheduler", "epsilon") == pytest.approx(expected)
    assert skip < 1e-8 and abs(out - 1) < 1e-8


@pytest.mark.parametrize(("name", "landing"), [("DDIMScheduler", ABAR[0]), ("TCDScheduler", ABAR[0])])
def test_the_weights_of_a_step_that_does_not_land_at_the_picture(name, landing):
    a = sqrt(landing / ABAR[999])
    assert weights(name, "epsilon") == pytest.approx((1, a, sqrt(1 - landing) - a * sqrt(1 - ABAR[999])))


def test_zero_terminal_snr_divides_by_nothing():
    k, w_0, w_1 = weights("DDIMScheduler", "v_prediction", rescale_betas_zero_snr=True, set_alpha_to_one=True)
    assert (k, w_0, w_1) == (1, 0, -1)
    with pytest.raises(ValueError, match="epsilon prediction says nothing at timestep 999"):
        weights("DDIMScheduler", "epsilon", rescale_betas_zero_snr=True)


# Constants in the weights.


@torch.no_grad()
def test_the_scale_of_the_input_is_folded_exactly():
    unet, folded = tiny.unet(), tiny.unet()
    fold_input_scale(folded, 0.5)  # a power of two, so nothing rounds
    z, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    assert torch.equal(folded(z, 999, text).sample, unet(0.5 * z, 999, text).sample)


def test_guidance_is_folded_as_diffusers_pipeline_passes_it():
    components = replace(tiny.sd15(), unet=tiny.unet(time_cond_proj_dim=8))
    config = SCHEDULER | {"_class_name": "LCMScheduler"}
    pipe = pipeline_of(components, config, LatentConsistencyModelPipeline)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text = encode_text(components, PROMPTS)
    pictures = []
    for guidance in (1.0, 8.5):
        expected = pipe(
            prompt_embeds=text,
            num_inference_steps=1,
            guidance_scale=guidance,
            latents=noise.clone(),
            output_type="latent",
        ).images
        unet = deepcopy(components.unet)
        fold_guidance(unet, guidance)
        pictures.append(ours((replace(components, unet=unet), None, noise, text), config))
        assert_same(pictures[-1], expected)
    assert (pictures[0] - pictures[1]).abs().max() > 100 * AMPLIFIED  # Guidance matters here.


def test_a_unet_without_guidance_takes_none():
    with pytest.raises(ValueError, match="`guidance`: the UNet takes no guidance scale"):
        fold_guidance(tiny.unet(), 8.5)


# Refusals.


@pytest.mark.parametrize(
    ("changes", "choice", "message"),
    [
        ({"_class_name": "MyScheduler"}, None, "one step of MyScheduler is not supported: expected .* DDIM, PNDM"),
        ({}, SchedulerChoice(name="os"), "one step of os is not supported"),
        ({"_class_name": "KDPM2DiscreteScheduler"}, None, "one step of KDPM2DiscreteScheduler is not supported"),
        ({"_class_name": "EDMEulerScheduler"}, None, "EDMEulerScheduler has no DDIM equivalent"),
        ({"prediction_type": "sample"}, None, "'sample' is not supported"),
        ({"_class_name": "LCMScheduler", "clip_sample": True}, None, "LCMScheduler clips its one step .clip_sample"),
        ({"_class_name": "DDPMScheduler", "thresholding": True}, None, "DDPMScheduler clips its one step .thresh"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}, None, "DDPMScheduler draws noise in its"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, None, "PNDMScheduler cannot make one step"),
        ({"prediction_type": "v_prediction", "timestep_type": "continuous"}, None, "one step at timestep 0.67"),
        ({"interpolation_type": "cubic"}, None, "EulerDiscreteScheduler cannot make one step: cubic"),
        ({}, SchedulerChoice(timestep=1000), "`timesteps` 1000: expected one of 0 to 999"),
        ({}, SchedulerChoice("UniPCMultistepScheduler", 399), "UniPCMultistepScheduler takes no `timesteps`"),
        (
            {},
            SchedulerChoice("EulerAncestralDiscreteScheduler", 0),
            "EulerAncestralDiscreteScheduler takes no `timesteps`",
        ),
    ],
)
def test_what_is_not_exact_is_refused_by_name(changes, choice, message):
    with pytest.raises(ValueError, match=message) as refused:
        one_step(SCHEDULER | changes, choice)
    assert "\n" not in str(refused.value)


def test_a_step_that_is_not_the_sum_is_refused(monkeypatch):
    """Such as that of a later version of diffusers."""
    own = diffusers.EulerDiscreteScheduler.step
    monkeypatch.setattr(
        diffusers.EulerDiscreteScheduler, "step", lambda self, *a, **o: (1.001 * own(self, *a, **o)[0],)
    )
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has options with which its one step is not"):
        one_step(SCHEDULER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "LCMScheduler draws noise at every step"),
        ({"_class_name": "TCDScheduler"}, "TCDScheduler draws noise at every step"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "EulerAncestralDiscreteScheduler draws noise"),
        ({"_class_name": "DPMSolverSDEScheduler"}, "DPMSolverSDEScheduler draws noise"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "draws noise"),
        ({"use_karras_sigmas": True}, "EulerDiscreteScheduler has use_karras_sigmas, so its timesteps"),
        ({"use_beta_sigmas": True}, "has use_beta_sigmas"),
        ({"_class_name": "MyScheduler"}, "MyScheduler is not a scheduler of diffusers"),
    ],
)
def test_schedulers_of_several_steps_that_are_nothing_like_ddim(changes, message):
    with pytest.raises(ValueError, match=f"{message}.*`steps` 1") as refused:
        check_several_steps(SCHEDULER | changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_a_tiue_students_pipeline_may_have_any_of_these(name):
    check_several_steps(SCHEDULER | {"_class_name": name})


# Exporting.


def save(components, scheduler, directory, pipeline="StableDiffusionPipeline"):
    """Write a pipeline directory with a scheduler of any class."""
    tiny.save_pipeline(components, directory)
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    tiny.edit_json(
        directory / "model_index.json", _class_name=pipeline, scheduler=["diffusers", scheduler["_class_name"]]
    )
    return directory


def export(*arguments):
    return main([str(argument) for argument in arguments])


def pictures_of(pipe, noise, **arguments):
    return pipe(PROMPTS, latents=noise.clone(), output_type="np", **arguments).images


def assert_bundle_draws(out, noise, expected):
    images = Pipeline.load(out, device="cpu")(PROMPTS, latents=noise.numpy()).images
    difference = np.abs(np.stack(images).astype(int) - np.round(expected * 255).astype(int))
    assert difference.max() <= GOLDEN_IMAGE_LEVELS


@pytest.mark.slow  # a whole export
def test_a_bundle_with_both_constants_draws_what_diffusers_draws(tmp_path, capsys):
    components = replace(tiny.sd15(), unet=tiny.unet(time_cond_proj_dim=8))
    source = save(components, SCHEDULER, tmp_path / "turbo")
    assert export("--ckpt", source, "--steps", 1, "--guidance", 3, "--out", tmp_path / "bundle") == 0
    assert "one-step student: EulerDiscreteScheduler, timestep 999" in capsys.readouterr().err

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = pictures_of(pipeline_of(components, SCHEDULER), noise, num_inference_steps=1, guidance_scale=3.0)
    assert_bundle_draws(tmp_path / "bundle", noise, expected)
    manifest = bundle.Bundle.load(tmp_path / "bundle").manifest
    assert manifest.created_from["scheduler"] == "one step of EulerDiscreteScheduler"
    assert (manifest.encoder_timestep, manifest.decoder_timesteps, list(manifest.schedules)) == (999, (999,), [1])


@pytest.mark.slow  # a second export
def test_a_bundle_of_a_guided_consistency_model_draws_what_diffusers_draws(tmp_path):
    components = replace(tiny.sd15(), unet=tiny.unet(time_cond_proj_dim=8))
    scheduler = SCHEDULER | {"_class_name": "LCMScheduler"}
    source = save(components, scheduler, tmp_path / "lcm", "LatentConsistencyModelPipeline")
    given = ("--timesteps", 399, "--guidance", 8.5)
    assert export("--ckpt", source, "--steps", 1, "--out", tmp_path / "bundle", *given) == 0

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipe = pipeline_of(components, scheduler, LatentConsistencyModelPipeline)
    assert_bundle_draws(tmp_path / "bundle", noise, pictures_of(pipe, noise, timesteps=[399], guidance_scale=8.5))
    assert bundle.Bundle.load(tmp_path / "bundle").manifest.schedules[1].timesteps == (399,)


# The configuration in stabilityai/sd-turbo. Its other parts have the configurations of Stable Diffusion 2.1-base.
SD_TURBO = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


@pytest.mark.slow  # It costs as much as an export of SD 2.1-base: see docs/stable-diffusion.md.
def test_sd_turbo_at_its_true_size_draws_what_diffusers_draws(tmp_path):
    source, out = write_pipeline("sd21-base", tmp_path / "sd-turbo"), tmp_path / "bundle"
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD_TURBO))
    tiny.edit_json(source / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert export("--ckpt", source, "--steps", 1, "--target", "cpu", "--out", out) == 0

    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(3))
    pipe = StableDiffusionPipeline.from_pretrained(source, local_files_only=True)
    arguments = {"num_inference_steps": 1, "guidance_scale": 0.0, "latents": noise}
    expected = pipe("a red heart", output_type="latent", **arguments).images
    picture = np.asarray(pipe("a red heart", output_type="pil", **arguments).images[0]).astype(int)
    del pipe
    pipeline = Pipeline.load(out, device="cpu")
    made = torch.from_numpy(pipeline("a red heart", latents=noise.numpy(), output_type="latent").images)
    drawn = np.asarray(pipeline("a red heart", latents=noise.numpy()).images[0]).astype(int)
    print(f"latents: {((made - expected).abs().max() / expected.std()).item():.1e} of std; ", end="")
    print(f"picture: {np.abs(drawn - picture).max()} of 255, {(drawn != picture).mean():.1e} of the values")
    assert_same(made, expected)
    assert np.abs(drawn - picture).max() <= GOLDEN_IMAGE_LEVELS


@pytest.fixture
def turbo(tmp_path):
    return save(tiny.sd15(), SCHEDULER, tmp_path / "turbo")


def test_the_pipelines_class_is_that_of_the_index(turbo):
    """diffusers makes the class that model_index.json names."""
    tiny.edit_json(turbo / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    step = load_source(turbo, [1]).one_step
    assert step is not None and step.scheduler == "LCMScheduler"


def test_a_unets_file_with_a_chosen_scheduler_draws_what_diffusers_draws(turbo, tmp_path, model):
    """SwiftBrush's way: the weights of a UNet, a pipeline of several steps for the rest, the plain x_0 at 999."""
    unet = tiny.unet()
    torch.manual_seed(5)
    for parameter in unet.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    _, _, noise, text = model
    with torch.no_grad():
        prediction = unet(noise, 999, text).sample
        student = load_source(
            tmp_path / "unet.safetensors", [1], base=turbo, choice=SchedulerChoice("DDPMScheduler", timestep=999)
        )
        assert_same(student.tiue()(noise, text), (noise - sqrt(1 - ABAR[999]) * prediction) / sqrt(ABAR[999]))


def test_loras_are_merged_before_the_input_is_scaled(turbo, tmp_path):
    own = load_components(turbo).unet.conv_in.weight
    down, up = torch.randn(2, *own.shape[1:]), torch.randn(own.shape[0], 2, 1, 1)
    file = tmp_path / "lora.safetensors"
    save_file({"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}, file)

    student = load_source(turbo, [1], loras=[Lora(file)])

    merged = own + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(student.components.unet.conv_in.weight, student.one_step.input_scale * merged)


@pytest.mark.filterwarnings(LITTLE_NOISE)
def test_only_one_step_alone_is_the_schedulers_own(turbo):
    for steps, own in (([1], True), ([4], False), ([4, 1], False), (None, False)):
        student = load_source(turbo, steps)
        assert (student.one_step is not None) == own
    assert load_source(turbo, None, choice=SchedulerChoice(timestep=399)).schedules == {1: [399]}
    with pytest.raises(ExportError, match="`timesteps`, `scheduler` and `guidance` go with `steps` 1, got 1,4"):
        load_source(turbo, [4, 1], choice=SchedulerChoice(timestep=399))


def test_a_step_at_a_timestep_without_noise_warns(turbo):
    with pytest.warns(UserWarning, match="timestep 1, where there is almost no noise to remove.*`timesteps` 999"):
        load_source(save(tiny.sd15(), tiny.SCHEDULER, turbo.parent / "leading"), [1])


def test_refusals_of_an_export(turbo, tmp_path, capsys):
    save_student(tmp_path / "student.safetensors", Student(tiny.sd15(), 751, {4: [751, 501, 251, 1]}))
    for arguments, message in (
        (("--ckpt", turbo, "--timesteps", "1000"), "turbo: --timesteps 1000: expected one of 0 to 999"),
        (("--ckpt", turbo, "--scheduler", "Foo"), "turbo: one step of Foo is not supported: expected the Scheduler of"),
        (("--ckpt", turbo, "--guidance", "2"), "turbo: --guidance: the UNet takes no guidance scale as an input"),
        (("--ckpt", turbo, "--steps", "2", "--timesteps", "9"), "--guidance go with --steps 1, got 2"),
        (("--ckpt", tmp_path / "student.safetensors", "--timesteps", "9"), "are for students of other methods, but"),
    ):
        assert export(*arguments, "--out", tmp_path / "bundle") == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(lines) == 1 and message in lines[0]
    tiny.edit_json(turbo / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    with pytest.raises(ExportError, match=r"turbo: LCMScheduler draws noise at every step.*`steps` 1"):
        load_source(turbo)


def test_a_guided_unet_needs_a_guidance_scale(tmp_path, capsys):
    guided = replace(tiny.sd15(), unet=tiny.unet(time_cond_proj_dim=8))
    source = save(guided, SCHEDULER | {"_class_name": "LCMScheduler"}, tmp_path / "lcm")
    assert export("--ckpt", source, "--steps", 1, "--out", tmp_path / "bundle") == 2
    assert "time_cond_proj_dim=8 is not supported" in (said := capsys.readouterr().err) and "--guidance" in said


def test_a_teacher_that_takes_guidance_is_refused(tmp_path):
    guided = replace(tiny.sd15(), unet=tiny.unet(time_cond_proj_dim=8))
    with pytest.raises(ComponentsError, match="time_cond_proj_dim=8 is not supported"):
        load_components(tiny.save_pipeline(guided, tmp_path / "lcm"))


def test_a_one_step_student_of_another_method_is_not_saved_as_a_tiue_student(turbo, tmp_path):
    student = load_source(turbo, [1])
    assert isinstance(student.one_step, OneStep)
    for save_it in (check_savable, lambda student: save_student(tmp_path / "student.safetensors", student)):
        with pytest.raises(CheckpointError, match="another method cannot be saved as a student"):
            save_it(student)
