import pytest
import tiny
import torch
from test_unet import UNETS, inputs
from tolerances import REORDERED
from torch import nn

from tiue.hoist import alias_weights, hoist
from tiue.schedule import closed_form
from tiue.unet import TiUE

MORE = {
    "groups across the boundary": {"block_out_channels": (24, 40), "norm_num_groups": 4},
    "one group": {"norm_num_groups": 1},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "only cross-attention": {"only_cross_attention": True},
    "no middle": {"mid_block_type": None},
    # Blocks of kinds that stay whole, first, last and alone.
    "attention without text": {
        "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "simple cross-attention": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
    "resnets that resample": {
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
}
TIMESTEPS = [751, 501, 251, 1]


def student(shared_up_blocks=0, **changes):
    return TiUE(tiny.unet(**changes), closed_form(tiny.SCHEDULER, 4), 751, shared_up_blocks)


@pytest.mark.parametrize("shared_up_blocks", [0, 1])
@pytest.mark.parametrize("changes", (UNETS | MORE).values(), ids=UNETS | MORE)
@torch.no_grad()
def test_hoisted_equals_whole(changes, shared_up_blocks):
    tiue = student(shared_up_blocks, **changes)
    for parameter in tiue.parameters():  # norms and biases that were never trained would hide how they are cut
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    latents, text = inputs(batch=2)
    encoder, decoder = hoist(tiue, TIMESTEPS)
    features = encoder(latents, text)
    assert len(features) == len(encoder.names) == len(set(encoder.names))
    expected, eps = tiue.predict(latents, text)
    weights = torch.tensor(tiue.schedule.step_weights, dtype=torch.float32)
    z_0 = tiue.schedule.noise_weight * latents + decoder(features, torch.arange(4), weights)
    assert (z_0 - expected).abs().max() < REORDERED * expected.std()
    alone = decoder(features, torch.tensor([2]), torch.ones(1))
    assert (alone - eps[2]).abs().max() < REORDERED * eps.std()


@torch.no_grad()
def test_the_student_stays_as_it_is():
    tiue = student()
    before = {name: value.clone() for name, value in tiue.state_dict().items()}
    latents, text = inputs()
    expected = tiue(latents, text)
    encoder, decoder = hoist(tiue, TIMESTEPS)
    for half in (encoder, decoder):
        half.to(torch.float64)
    after = tiue.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(tiue(latents, text), expected)


def test_shared_weights_take_no_memory():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    copy = alias_weights(module)
    assert copy[0].weight.data_ptr() == module[0].weight.data_ptr()
    assert copy[1].running_mean.data_ptr() == module[1].running_mean.data_ptr()
    copy[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert module[0].weight.abs().sum() > 0


def test_what_moves_out_of_the_decoder():
    """Where groups end between hidden and skip: all of the skips' convolutions, and the text's keys and values."""
    tiue = student(block_out_channels=(16, 16))
    encoder, decoder = hoist(tiue, TIMESTEPS)

    def input_channels(module):
        return sum(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))

    resnets = [resnet for block in tiue.unet.up_blocks for resnet in block.resnets]
    moved = 32 + 16 * (len(resnets) - 1)  # the first resnet's input is all skip, so to say
    assert input_channels(encoder.blocks) == moved
    assert input_channels(decoder) == input_channels(nn.ModuleList([tiue.unet.up_blocks, tiue.unet.conv_out])) - moved
    projections = [name for name, _ in decoder.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert projections and len(encoder.projections) == len(projections)
    assert not any("time_emb" in name for name, _ in decoder.named_modules())


def test_sharing_all_up_blocks_is_refused():
    with pytest.raises(ValueError, match="shared_up_blocks: expected 0 to 1 for a UNet of 2 up blocks, got 2"):
        student(shared_up_blocks=2)
