import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from tolerances import REORDERED

from tiue.schedule import closed_form
from tiue.unet import TiUE

UNETS = {
    "sd15": {},
    "linear projections": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "attention everywhere": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
    "deep": {
        "block_out_channels": (8, 16, 16, 24),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


@pytest.fixture(params=UNETS)
def tiue(request):
    return TiUE(tiny.unet(**UNETS[request.param]), closed_form(tiny.SCHEDULER, 4), 751)


def inputs(batch=2, height=8, width=16):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, height, width, generator=draw), torch.randn(batch, 5, 16, generator=draw)


@pytest.mark.parametrize("size", [(8, 16), (8, 8), (11, 13)])
@torch.no_grad()
def test_at_the_encoders_timestep_the_halves_are_the_unet(tiue, size):
    latents, text = inputs(2, *size)
    whole = tiue.unet(latents, tiue.encoder_timestep, text).sample
    halves = tiue.decode(tiue.encode(latents, text), torch.tensor([tiue.encoder_timestep]), text)
    assert torch.equal(whole, halves)


@torch.no_grad()
def test_forward_is_the_two_halves_and_the_sum(tiue):
    latents, text = inputs()
    z_0, eps = tiue.predict(latents, text)
    decoded = tiue.decode(tiue.encode(latents, text), torch.tensor(tiue.schedule.timesteps), text)
    assert eps.shape == (4, *latents.shape)
    assert torch.equal(decoded, eps.flatten(0, 1))
    assert torch.equal(z_0, tiue(latents, text))
    summed = tiue.schedule.noise_weight * latents
    for weight, e in zip(tiue.schedule.step_weights, eps, strict=True):
        summed = summed + weight * e
    torch.testing.assert_close(z_0, summed, atol=REORDERED, rtol=REORDERED)


@torch.no_grad()
def test_rows_are_step_major_and_independent(tiue):
    latents, text = inputs(batch=3)
    features = tiue.encode(latents, text)
    rows = tiue.decode(features, torch.tensor([501, 1]), text)
    for i, t in enumerate((501, 1)):
        alone = tiue.decode(features, torch.tensor([t]), text)
        torch.testing.assert_close(rows[3 * i : 3 * i + 3], alone, atol=REORDERED, rtol=REORDERED)


@torch.no_grad()
def test_another_schedule_can_be_asked_for(tiue):
    latents, text = inputs()
    two = closed_form(tiny.SCHEDULER, 2)
    torch.testing.assert_close(tiue(latents, text, two), TiUE(tiue.unet, two, 751)(latents, text))


def test_gradients_reach_every_weight_with_and_without_checkpointing(tiue):
    latents, text = inputs()

    def gradients():
        tiue.zero_grad()
        tiue(latents, text).square().mean().backward()
        return {name: p.grad.clone() for name, p in tiue.named_parameters()}

    plain = gradients()
    tiue.unet.train()
    tiue.unet.enable_gradient_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@torch.no_grad()
def test_under_autocast_predictions_are_rounded_and_their_sum_is_not(tiue):
    latents, text = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        z_0, eps = tiue.predict(latents, text)
    assert eps.shape == (4, *latents.shape)
    assert torch.equal(eps, eps.bfloat16().float())
    summed = tiue.schedule.noise_weight * latents
    for weight, e in zip(tiue.schedule.step_weights, eps, strict=True):
        summed = summed + weight * e
    torch.testing.assert_close(z_0, summed, atol=REORDERED, rtol=REORDERED)


def test_lora_layers_inside(tiue):
    latents, text = inputs()
    before = tiue(latents, text)
    tiue.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    torch.testing.assert_close(tiue(latents, text), before)
    tiue(latents, text).sum().backward()
    assert all(p.grad is not None for name, p in tiue.named_parameters() if "lora" in name)


def test_the_unet_is_wrapped_not_copied(tiue):
    assert {f"unet.{name}" for name in tiue.unet.state_dict()} == set(tiue.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8,
        },
        {"class_embed_type": "timestep"},
        {"num_class_embeds": 3},
        {"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"},
        {"time_cond_proj_dim": 8},
        {"center_input_sample": True},
        {"in_channels": 9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_unets_with_other_inputs_are_refused_by_name(changes):
    name = "9 input" if "in_channels" in changes else next(iter(changes))
    with pytest.raises(ValueError, match=name):
        TiUE(tiny.unet(**changes), closed_form(tiny.SCHEDULER, 4), 751)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="AutoencoderKL"):
        TiUE(AutoencoderKL(), closed_form(tiny.SCHEDULER, 4), 751)
