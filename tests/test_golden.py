"""PyTorch against the golden data; the exported bundles are in test_export.py."""

import torch
from tolerances import REORDERED

from tiue.schedule import closed_form
from tiue.text_encoder import encode_text, tokenize
from tiue.unet import TiUE


@torch.no_grad()
def test_latents(golden, golden_components):
    schedule = closed_form(golden_components.scheduler_config, golden.steps)
    assert list(schedule.timesteps) == golden.timesteps
    tiue = TiUE(golden_components.unet, schedule, schedule.timesteps[0])
    latents = tiue(golden.noise, golden.prompt_embeds)
    torch.testing.assert_close(latents, golden.latents, atol=REORDERED, rtol=0)


@torch.no_grad()
def test_prompts(golden, golden_components):
    ids, mask = tokenize(golden_components, golden.prompts)
    assert torch.equal(ids, golden.input_ids)
    assert mask is None
    text = encode_text(golden_components, golden.prompts)
    torch.testing.assert_close(text, golden.prompt_embeds, atol=REORDERED, rtol=0)
