import json
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler
from invented import save_pictures
from PIL import Image
from safetensors.torch import load_file
from tiny import v_teacher as teacher
from tolerances import AMPLIFIED, REORDERED
from torch import nn

from evaluation.encoder.encoder_config import Shape
from evaluation.encoder.network import Encoder, save_encoder
from evaluation.few_steps import distilled, sample_few_steps
from evaluation.painters import pipeline_painter
from export.export_options import Options
from export.plan import make_plan
from recipes.baselines import add, lcm, swiftbrush, swiftbrushv2
from recipes.baselines.__main__ import METHODS, main
from recipes.baselines.config import PRESETS, SWIFTBRUSH, SWIFTBRUSH_V2, AddConfig, LcmConfig, SwiftBrushV2Config
from recipes.baselines.critic import Critic, gradient_penalty, hinge_loss, student_loss
from recipes.baselines.few_steps import lcm_scheduler
from recipes.baselines.memory import memory
from recipes.baselines.observers import EncoderAlignment, EncoderObserver
from recipes.baselines.pictures import CaptionedPictures, encode_latents
from tiue.checkpoint import load_student
from tiue.components import decode_latents
from tiue.diffusion import Diffusion
from tiue.distill.config import DistillConfig, preset_names, read_preset
from tiue.distill.draws import Draws
from tiue.distill.loop import train
from tiue.distill.scores import guided
from tiue.losses import CLIP_MARGIN
from tiue.one_step import one_step
from tiue.schedule import NoiseSchedule

SHORT = {"iterations": 2, "batch_size": 2, "learning_rate": 1e-4, "checkpoint_every": 1, "sample_every": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def data(folder) -> CaptionedPictures:
    geometry = teacher().geometry
    return CaptionedPictures(folder, geometry.height * geometry.pixels_per_latent)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    shape = Shape(resolution=16, widths=(8, 8, 16, 16), embedding=16, text_hidden=8)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, shape, Encoder(shape).state_dict())
    return path


class Point(nn.Module):
    """The exact network of a world with one picture, whatever the text."""

    def __init__(self, diffusion: Diffusion, picture: torch.Tensor):
        super().__init__()
        self._diffusion, self._picture = diffusion, picture

    def forward(self, z, t, text, *_):
        alpha, sigma = self._diffusion.scales(t)
        noise = (z - alpha * self._picture) / sigma
        return SimpleNamespace(sample=alpha * noise - sigma * self._picture)  # v


# The noise process.


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_prediction_implies_the_picture_and_the_noise(prediction):
    schedule = NoiseSchedule.from_config(tiny.SCHEDULER | {"prediction_type": prediction})
    reference, diffusion = DDIMScheduler.from_config(tiny.SCHEDULER), Diffusion(schedule, CPU)
    z_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([5, 500, 980])
    z_t = diffusion.noised(z_0, noise, t)
    torch.testing.assert_close(z_t, reference.add_noise(z_0, noise, t), atol=REORDERED, rtol=0)
    exact = noise if prediction == "epsilon" else reference.get_velocity(z_0, noise, t)
    torch.testing.assert_close(diffusion.picture(exact, z_t, t), z_0, atol=AMPLIFIED, rtol=0)
    torch.testing.assert_close(diffusion.noise(exact, z_t, t), noise, atol=REORDERED, rtol=0)


def test_guidance_may_differ_by_sample():
    model, generator = teacher(), torch.Generator().manual_seed(0)
    z, text = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 32, 16, generator=generator)
    null, t = torch.randn(1, 32, 16, generator=generator), torch.tensor([10, 700])
    with torch.no_grad():
        both = guided(model.unet, z, t, text, null, torch.tensor([1.0, 3.0]).view(-1, 1, 1, 1))
        plain, scaled = (guided(model.unet, z, t, text, null, scale) for scale in (1.0, 3.0))
    torch.testing.assert_close(both, torch.stack([plain[0], scaled[1]]), atol=REORDERED, rtol=0)


# Pictures with captions.


def test_samples_are_pictures_with_one_of_their_captions(data, tmp_path):
    method = lcm.prepare(teacher(), data, tmp_path, LcmConfig(**SHORT))[1]
    seen = set()
    for step in range(20):
        part = method_run_part(tmp_path, step)
        pixels, captions = data.of(part)
        assert pixels.shape == (2, 3, 16, 16) and -1 <= pixels.min() < pixels.max() <= 1
        seen |= set(captions)
    assert "a cat" in seen and {"thing 2", "a thing 2"} <= seen
    assert method.describe(SimpleNamespace(parts=[method_run_part(tmp_path, 3)])).startswith("prompts: '")


def method_run_part(out: Path, step: int):
    from tiue.distill.method import Run

    return Run(out, LcmConfig(**SHORT)).batch(step).parts[0]


def test_latents_decode_to_the_pixels_they_were_made_of():
    vae = teacher().vae
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    torch.testing.assert_close(decode_latents(vae, encode_latents(vae, pixels)), expected, atol=AMPLIFIED, rtol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected the captions"),
        ("", "at least one picture"),
        ("{", "line 1: expected"),
        ('["0.png", "x"]', "line 1: expected"),
        ('{"file_name": "0.png"}', "line 1: expected"),
        ('{"file_name": "0.png", "text": []}', "line 1: expected"),
        ('{"file_name": "0.png", "text": [1]}', "one caption or a list of captions"),
        ('{"file_name": "absent.png", "text": "x"}', "absent.png, which is not in the folder"),
    ],
)
def test_malformed_captions_are_refused(tmp_path, content, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    if content is not None:
        (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        CaptionedPictures(tmp_path, 8)


# LCM.


def test_pseudo_huber_loss():
    one = torch.tensor([0.0, 3.0])
    assert lcm.pseudo_huber(one, torch.zeros(2), 4.0).item() == pytest.approx((0 + 1) / 2)


def test_boundary_conditions_are_those_of_diffusers():
    scheduler = LCMScheduler()
    scheduler.set_timesteps(4)
    for t in (0, 19, 999):
        c_skip, c_out = lcm.boundary_conditions(torch.tensor([t]), 0.5, 10.0)
        expected = [float(c) for c in scheduler.get_scalings_for_boundary_condition_discrete(t)]
        assert [c_skip.item(), c_out.item()] == pytest.approx(expected, rel=1e-5)


def test_a_grid_finer_than_the_teachers_timesteps_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="a grid of 1001 timesteps is finer than the teacher's 1000"):
        lcm.prepare(teacher(), data, tmp_path, LcmConfig(**SHORT, ddim_steps=1001))


def test_fsdp_is_refused(data, tmp_path, monkeypatch):
    sharded = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP))
    monkeypatch.setattr(lcm, "start_run", lambda *_: sharded)
    with pytest.raises(ValueError, match="LCM runs with DDP, not with FSDP"):
        lcm.prepare(teacher(), data, tmp_path, LcmConfig(**SHORT))


def test_the_teacher_steps_like_ddim(data, tmp_path):
    method = lcm.prepare(teacher(), data, tmp_path, LcmConfig(**SHORT))[1]
    scheduler = DDIMScheduler.from_config(teacher().scheduler_config)
    scheduler.set_timesteps(50)
    z, text = torch.randn(1, 16, 8, 8), method.embed(["a cat"])
    for t in (999, 499, 39):
        with torch.no_grad():
            ours = method.teacher_step(z, torch.tensor([t]), torch.tensor([t - 20]), text, torch.tensor([4.0]))
            predicted = guided(method.teacher, z, torch.tensor([t]), text, method.null, 4.0)
        torch.testing.assert_close(ours, scheduler.step(predicted, t, z).prev_sample, atol=AMPLIFIED, rtol=0)


def test_the_consistency_loss_in_a_world_of_one_picture(data, tmp_path):
    # Every point of the ODE's path leads to the picture mu. Only the boundary conditions are left in the loss:
    # d = c_skip(t) z_t - c_skip(s) z_s + (c_out(t) - c_out(s)) mu.
    config = LcmConfig(**SHORT, sample_steps=1, ddim_steps=1, skip=999, timestep_scaling=1e-3)
    method = lcm.prepare(teacher(), data, tmp_path, config)[1]
    mu = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    method.teacher = method.target = method.student = Point(method.diffusion, mu)
    z_0, text = mu.expand(2, -1, -1, -1), method.embed(["a", "b"])
    found = method.loss(z_0, text, Draws(0, 0, 0, 2, CPU))
    draws = Draws(0, 0, 0, 2, CPU)
    draws.integers(0, 1), draws.uniform()
    noise = draws.normal(z_0.shape[1:])
    skip, out = 0.25 / (0.999**2 + 0.25), 0.999 / (0.999**2 + 0.25) ** 0.5
    z_s = method.diffusion.noised(z_0, noise, torch.tensor([0, 0]))
    expected = ((skip * noise + out * mu - z_s).square() + 1e-6).sqrt() - 1e-3
    assert found.item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_guidance_changes_nothing_before_training():
    model = teacher()
    student = lcm.guided_unet(model.unet)
    z, text, t = torch.randn(1, 16, 8, 8), torch.randn(1, 32, 16), torch.tensor([500])
    with torch.no_grad():
        expected = model.unet(z, t, text).sample
        made = student(z, t, text, None, lcm.embed_guidance(torch.tensor([9.0]), 256)).sample
    assert torch.equal(made, expected)


def test_the_target_follows_the_student(data, tmp_path):
    run, method = lcm.prepare(teacher(), data, tmp_path, LcmConfig(**SHORT, target_decay=0.75))
    before = method.model.conv_in.weight.detach().clone()
    method.update(0, run.batch(0))
    after = method.model.conv_in.weight.detach()
    assert not torch.equal(before, after)
    torch.testing.assert_close(method.target.conv_in.weight, 0.75 * before + 0.25 * after)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_consistency_model_is_sampled_as_by_diffusers(steps):
    model = teacher()
    unet = lcm.guided_unet(model.unet)
    nn.init.normal_(unet.time_embedding.cond_proj.weight)
    scheduler = {name: v for name, v in model.scheduler_config.items() if name != "timestep_spacing"}
    scheduler = LCMScheduler.from_config(scheduler)
    noise, text = torch.randn(2, 16, 8, 8), torch.randn(2, 32, 16)
    pipeline = LatentConsistencyModelPipeline(
        model.vae, model.text_encoder, model.tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=text,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="latent",
    ).images
    with torch.no_grad():
        made = sample_few_steps(distilled(unet, text, 5.0), scheduler.config, noise, steps, [3, 4])
    torch.testing.assert_close(made, expected, atol=REORDERED, rtol=0)


# ADD.


def test_hinge_loss_and_the_students_loss():
    real, fake = [torch.tensor([[2.0, 0.0]])], [torch.tensor([[-3.0, 0.5]])]
    assert hinge_loss(real, fake).item() == pytest.approx((0 + 1) / 2 + (0 + 1.5) / 2)
    assert student_loss([*fake, torch.tensor([[1.0]])]).item() == pytest.approx(1.25 - 1)


def test_the_gradient_penalty_of_a_linear_critic():
    features = torch.randn(3, 5, 4, requires_grad=True)
    weight = torch.arange(5.0)
    logits = [torch.einsum("bcl,c->bl", features, weight)]
    assert gradient_penalty(logits, [features]).item() == pytest.approx(4 * weight.square().sum().item())


def test_from_pure_noise_the_critic_knows_the_caption_alone(data, encoder, tmp_path):
    for timestep, known in ((999, False), (499, True)):
        config, observer = AddConfig(**SHORT), EncoderObserver(encoder, CPU)
        run, method = add.prepare(teacher(), data, tmp_path / str(timestep), config, observer)
        method._timesteps = torch.tensor([timestep])
        conditions = []
        method.critic.network.register_forward_pre_hook(lambda _, inputs, seen=conditions: seen.append(inputs[1]))
        method.update(0, run.batch(0))
        assert len(conditions) == 3  # the student's picture, then the real one and the student's again
        assert all(bool(seen[:, -observer.embedding :].any()) == known for seen in conditions)


def test_the_distillation_loss_pulls_towards_the_teachers_picture():
    x, target = torch.randn(2, 3, 4, 5, 5).unbind()
    x.requires_grad_()
    add.distillation_loss(x, target, torch.tensor([0.5, 1.0, 2.0])).backward()
    expected = 2 * torch.tensor([0.5, 1.0, 2.0]).view(-1, 1, 1, 1) * (x - target) / x.numel()
    torch.testing.assert_close(x.grad, expected.detach())


def test_distillation_in_a_world_of_one_picture(data, encoder, tmp_path):
    method = add.prepare(teacher(), data, tmp_path, AddConfig(**SHORT), EncoderObserver(encoder, CPU))[1]
    mu = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    method.teacher = Point(method.diffusion, mu)
    x = torch.zeros(2, 16, 8, 8)
    found = method.distillation(x, method.embed(["a", "b"]), Draws(0, 0, 0, 2, CPU))
    t = Draws(0, 0, 0, 2, CPU).integers(0, 1000)
    expected = method.diffusion.abar[t].sqrt().mean() * mu.square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_student_and_the_critic_learn_from_their_own_losses(data, encoder, tmp_path):
    config = AddConfig(**SHORT, timesteps=(999,), sample_steps=1)
    run, method = add.prepare(teacher(), data, tmp_path, config, EncoderObserver(encoder, CPU))
    heads = [p.detach().clone() for p in method._heads.parameters()]
    weight = method.model.conv_in.weight.detach().clone()
    method.update(0, run.batch(0))
    moved = [(p.detach() - old).abs().max().item() for p, old in zip(method._heads.parameters(), heads, strict=True)]
    # Adam's first step is the learning rate at most: one step, of the critic's own loss.
    assert 0 < max(moved) <= 1.01 * config.critic_learning_rate
    assert not torch.equal(method.model.conv_in.weight.detach(), weight)


def test_the_critic_judges_under_a_condition():
    torch.manual_seed(0)
    critic, features = Critic([8, 4], 6), [torch.randn(2, 8, 9), torch.randn(2, 4, 4)]
    first, other = critic(features, torch.ones(2, 6)), critic(features, -torch.ones(2, 6))
    assert [logits.shape for logits in first] == [(2, 9), (2, 4)]
    assert not torch.allclose(first[0], other[0])


@pytest.mark.parametrize(
    ("timesteps", "expected"), [((1000,), "999"), ((999, 749), "999, 499"), ((999, 999), "999, 499")]
)
def test_timesteps_at_which_samples_do_not_begin_are_refused(timesteps, expected, data, encoder, tmp_path):
    config = AddConfig(timesteps=timesteps, sample_steps=1)
    with pytest.raises(ValueError, match=f"`timesteps` must be {expected} for this teacher, got {timesteps[0]}"):
        add.prepare(teacher(), data, tmp_path, config, EncoderObserver(encoder, CPU))


def test_samples_of_more_steps_than_the_student_has_are_refused():
    with pytest.raises(ValueError, match="`sample_steps` must not exceed the number of `timesteps`, got 4 and 2"):
        AddConfig(timesteps=[999, 499])
    scheduler = lcm_scheduler(teacher(), 2, 1e4)
    with pytest.raises(ValueError, match="`steps` must be at most 2, the timesteps that this model knows, got 4"):
        sample_few_steps(lambda z, t: z, scheduler, torch.zeros(1, 16, 8, 8), 4, [1])


# SwiftBrush.


def test_one_step_from_pure_noise_is_the_picture_of_the_prediction(tmp_path):
    config = DistillConfig(**SHORT, **SWIFTBRUSH, lora_rank=2)
    model = tiny.sd15()
    model = replace(model, scheduler_config=model.scheduler_config | {"set_alpha_to_one": True})
    method = swiftbrush.prepare(model, ["a", "b"], tmp_path, config)[1]
    z_T, text = torch.randn(2, 4, 8, 8), method.captions.encode(["a", "b"])
    with torch.no_grad():
        z_0, _ = method.predict(z_T, text, method.schedules[1])
        t = torch.tensor([999, 999])
        expected = method.diffusion.picture(method.model(z_T, t, text).sample, z_T, t)
    torch.testing.assert_close(z_0, expected, atol=AMPLIFIED, rtol=AMPLIFIED)


def test_more_steps_or_a_kl_term_are_not_swiftbrush(tmp_path):
    for settings in ({"steps": (4,)}, {"kl_weight": 0.8}):
        with pytest.raises(ValueError, match="one-step VSD has"):
            swiftbrush.prepare(teacher(), ["a"], tmp_path, DistillConfig(**SWIFTBRUSH | settings))


def v2(encoder: Path, out: Path, rank: int) -> Path:
    model = teacher()
    config = SwiftBrushV2Config(**SHORT, **SWIFTBRUSH_V2, student_rank=rank, lora_rank=2)
    initial, alignment = teacher().unet, EncoderAlignment(encoder, model, 0.9)
    prepared = swiftbrushv2.prepare(model, ["a", "b", "c"], out, config, initial=initial, alignment=alignment)
    return train(*prepared, progress=False)


def test_students_trained_whole_and_by_adapters_are_merged(encoder, tmp_path):
    paths = [v2(encoder, tmp_path / str(rank), rank) for rank in (0, 2)]
    start = teacher().unet.state_dict()
    full, lora = (load_student(path).components.unet.state_dict() for path in paths)
    assert full.keys() == lora.keys() == start.keys()
    moved = {name for name in start if not torch.equal(lora[name], start[name])}
    assert moved and all(".to_" in name for name in moved)  # adapters of attention alone
    assert any(not torch.equal(full[name], start[name]) for name in start.keys() - moved)
    merged = tmp_path / "merged.safetensors"
    arguments = ["merge", "--full", str(paths[0]), "--lora", str(paths[1]), "--share", "0.25", "--out", str(merged)]
    assert main(arguments) == 0
    mixed = load_student(merged).components.unet.state_dict()
    for name in start:
        torch.testing.assert_close(mixed[name], 0.75 * full[name] + 0.25 * lora[name])


def test_only_the_adapters_are_trained(encoder, tmp_path):
    model = teacher()
    config = SwiftBrushV2Config(**SHORT, **SWIFTBRUSH_V2, student_rank=2, lora_rank=2)
    alignment = EncoderAlignment(encoder, model, 0.9)
    method = swiftbrushv2.prepare(model, ["a"], tmp_path, config, initial=teacher().unet, alignment=alignment)[1]
    trained = [name for name, parameter in method.model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_students_of_different_structure_are_not_merged(tmp_path):
    small = swiftbrush.one_step_student(teacher(), teacher().unet)
    other = swiftbrush.one_step_student(teacher(), tiny.unet(in_channels=16, out_channels=16))
    with pytest.raises(ValueError, match="same structure"):
        swiftbrushv2.merge(small, other)


def test_a_caption_that_fits_costs_nothing(encoder):
    latents = torch.randn(2, 16, 8, 8, requires_grad=True)
    strict, lenient = (EncoderAlignment(encoder, teacher(), margin).to(CPU) for margin in (1.0, 0.0))
    loss = strict.loss(latents, ["a cat", "a dog"])
    cosine = 1 - loss.item()
    loss.backward()
    assert latents.grad.abs().sum() > 0
    assert lenient.loss(latents, ["a cat", "a dog"]).item() == pytest.approx(max(-cosine, 0), abs=1e-6)


def test_the_alignment_works_after_the_models_vae_has_moved(encoder):
    """The sample grids move it to the CPU. Here it moves away from there."""
    model, latents = teacher(), torch.randn(1, 16, 8, 8, requires_grad=True)
    alignment = EncoderAlignment(encoder, model, 1.0).to(CPU)
    before = alignment.loss(latents, ["a cat"])
    model.vae.to("meta")
    after = alignment.loss(latents, ["a cat"])
    after.backward()
    assert after.item() == before.item() and latents.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in alignment._vae.parameters())


# Runs and the command line.


def prepared(name: str, out: Path, iterations: int, data: CaptionedPictures, encoder: Path):
    settings = SHORT | {"iterations": iterations}
    if name == "lcm":
        return lcm.prepare(teacher(), data, out, LcmConfig(**settings), sample_prompts=["a cat"])
    return add.prepare(teacher(), data, out, AddConfig(**settings), EncoderObserver(encoder, CPU), sample_prompts=["x"])


@pytest.mark.parametrize("name", ["lcm", "add"])
def test_a_resumed_run_gives_the_same_pipeline(name, data, encoder, tmp_path):
    train(*prepared(name, tmp_path / "whole", 2, data, encoder), progress=False)
    train(*prepared(name, tmp_path / "parts", 1, data, encoder), progress=False)
    train(*prepared(name, tmp_path / "parts", 2, data, encoder), progress=False)
    file = "pipeline/unet/diffusion_pytorch_model.safetensors"
    whole, parts = (load_file(tmp_path / out / file) for out in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())
    assert (tmp_path / "whole/samples/step-000002.png").exists()
    painter = pipeline_painter(tmp_path / "whole/pipeline", CPU, 2, 4.0)
    pictures = painter(["a cat", "x"], range(1, 3))
    assert pictures.shape == (4, 16, 16, 3)
    assert np.array_equal(painter(["x"], range(1, 3)), pictures[2:])  # Seeds decide all noise.
    with pytest.raises(ValueError, match="`spacing` is a setting of DDIM"):
        pipeline_painter(tmp_path / "whole/pipeline", CPU, 2, 4.0, "trailing")


def arguments(method: str, folder: Path, encoder: Path, out: Path) -> list[str]:
    pipeline = tiny.save_pipeline(teacher(), out / "teacher")
    prompts = out / "prompts.txt"
    prompts.write_text("a cat\nthe sea\n")
    own = {
        "lcm": ["--pictures", str(folder)],
        "add": ["--pictures", str(folder), "--observer", str(encoder)],
        "swiftbrush": ["--prompts", str(prompts), "--lora-rank", "2"],
        "swiftbrushv2": [
            "--prompts",
            str(prompts),
            "--clip",
            str(encoder),
            "--init",
            str(pipeline),
            "--lora-rank",
            "2",
        ],
    }
    run = ["--iterations", "1", "--batch-size", "2", "--out", str(out / "run")]
    return [method, "--teacher", str(pipeline), *own[method], *run]


@pytest.mark.parametrize("method", METHODS)
def test_the_command_distills(method, folder, encoder, tmp_path, capsys):
    assert main(arguments(method, folder, encoder, tmp_path)) == 0
    assert "result written to" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text())["iterations"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_flag_is_named(method, folder, encoder, tmp_path, capsys):
    given = arguments(method, folder, encoder, tmp_path)
    place = given.index(f"--{METHODS[method].needs[0]}")
    assert main(given[:place] + given[place + 2 :]) == 2
    assert f"{method} needs --{METHODS[method].needs[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_prints_settings_and_memory(method, folder, encoder, tmp_path, capsys):
    pipeline = tiny.save_pipeline(teacher(), tmp_path / "teacher")
    assert main([method, "--teacher", str(pipeline), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "learning_rate" in out and "memory of the GPU, GB" in out
    config = METHODS[method].config(**METHODS[method].defaults)
    averages = [replace(config, **changes) for changes in ({}, {"ema_on_cpu": True}, {"ema_decay": 0.0})]
    assert [memory(method, pipeline, one)["EMA"] > 0 for one in averages] == [True, False, False]
    if method == "swiftbrushv2":  # Of its student, adapters alone have gradients.
        whole, adapters = (memory(method, pipeline, replace(config, student_rank=rank)) for rank in (0, 2))
        saved = whole["gradients"] - adapters["gradients"]
        assert 0 < saved < whole["gradients"] and whole["Adam"] - adapters["Adam"] == 2 * saved


@pytest.mark.parametrize("preset", preset_names(PRESETS))
def test_presets_are_settings_of_their_method(preset):
    command = METHODS[preset.split("-")[0]]
    config = command.config(**command.defaults | read_preset(preset, command.config, PRESETS))
    assert config.iterations > 100
    assert getattr(config, "clip_margin", CLIP_MARGIN) == CLIP_MARGIN


def test_wrong_settings_are_named_by_their_flags(folder, encoder, tmp_path, capsys):
    given = arguments("lcm", folder, encoder, tmp_path)
    assert main([*given, "--guidance-min", "9", "--guidance-max", "8"]) == 2
    assert "--guidance-min must not exceed --guidance-max, got 9.0 and 8.0" in capsys.readouterr().err
    assert main(["merge", "--full", "a", "--lora", "b", "--share", "2", "--out", "c"]) == 2
    assert "--share must be a number from 0 to 1" in capsys.readouterr().err
    aligned = arguments("swiftbrushv2", folder, encoder, tmp_path)
    assert main([*aligned, "--tiny-vae", str(tmp_path)]) == 2
    assert f"--tiny-vae is for a CLIP directory, and {encoder} is none" in capsys.readouterr().err


def test_a_start_that_does_not_fit_the_teacher_is_refused(folder, encoder, tmp_path, capsys):
    given = arguments("lcm", folder, encoder, tmp_path)
    other = tiny.save_pipeline(tiny.sd15(), tmp_path / "other")
    assert main([*given, "--init", str(other)]) == 2
    assert f"{other} cannot start for this teacher: its in_channels is 4" in capsys.readouterr().err
    scheduler = json.loads((tmp_path / "teacher/scheduler/scheduler_config.json").read_text())
    other = tiny.save_pipeline(teacher(), tmp_path / "changed")
    for changes, said in (
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": False}, "predicts epsilon, and the teacher v_"),
        ({"beta_end": 0.013}, "it learned another noise process"),
    ):
        (other / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | changes))
        assert main([*given, "--init", str(other)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_resume_with_another_observer(folder, encoder, tmp_path, capsys):
    given = arguments("add", folder, encoder, tmp_path)
    assert main(given) == 0
    other = tmp_path / "other.safetensors"
    shape = Shape(resolution=16, widths=(8, 8, 16, 16), embedding=16, text_hidden=8)
    save_encoder(other, shape, Encoder(shape).state_dict())
    assert main([*given, "--observer", str(other), "--iterations", "2"]) == 2
    assert "another configuration: observer" in capsys.readouterr().err


def test_a_student_of_swiftbrush_can_be_exported_as_one_step(tmp_path):
    config = DistillConfig(**SHORT, **SWIFTBRUSH, lora_rank=2)
    path = train(*swiftbrush.prepare(teacher(), ["a", "b"], tmp_path, config), progress=False)
    manifest = make_plan(load_student(path), Options()).manifest
    assert manifest.encoder_timestep == 999 and [*manifest.schedules] == [1]
    ((timestep,), noise_weight, (step_weight,)) = astuple(manifest.schedules[1])
    # Pure noise: z_0 = sqrt(1 - abar_0) z - sqrt(abar_0) v, where a little noise is left at the first timestep.
    assert timestep == 999 and noise_weight**2 + step_weight**2 == pytest.approx(1) and step_weight < -0.99


def test_adds_step_is_the_picture_of_its_prediction():
    scheduler = lcm_scheduler(teacher(), 4, 1e4) | {"_class_name": "LCMScheduler"}
    found = one_step(scheduler)
    assert found.schedule.timesteps == (999,)  # z_0 = sqrt(abar) z - sqrt(1 - abar) v, with abar = 0
    assert (found.schedule.noise_weight, *found.schedule.step_weights) == pytest.approx((0, -1), abs=1e-10)
