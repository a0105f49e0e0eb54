import dataclasses

import pytest
import tiny
import torch
from accelerate import Accelerator
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from safetensors.torch import load_file

from tiue.distill.config import DistillConfig
from tiue.distill.loop import train
from tiue.distill.optimizers import make_muon, make_optimizer
from tiue.distill.vsd import prepare


def test_a_run_with_8_bit_averages_resumes_to_the_same_weights(tmp_path):
    config = DistillConfig(batch_size=2, checkpoint_every=2, optimizer="adam8bit", channels_last=True)

    def run(out, iterations):
        made = prepare(tiny.emoji(), "abc", tmp_path / out, dataclasses.replace(config, iterations=iterations))
        train(*made, progress=False)
        return made[1]

    whole = run("whole", 4)
    kept = [state["state1"].dtype for state in whole.student.optimizer.state.values()]
    assert kept.count(torch.uint8) > 20
    assert whole.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    run("parts", 2)
    run("parts", 4)
    students = [load_file(tmp_path / out / "student.safetensors") for out in ("whole", "parts")]
    assert all(torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())


def test_8_bits_follow_adam():
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("adam", "adam8bit"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make_optimizer(name, torch.nn.ParameterList([weight]), 1e-2, Accelerator(cpu=True))
        for _ in range(20):
            weight.square().mul(0.5).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[name] = weight.detach() - start
    error = (found["adam8bit"] - found["adam"]).square().mean().sqrt()
    assert 0 < error < 0.05 * found["adam"].square().mean().sqrt()


def test_muon_moves_a_matrix_in_all_directions_alike():
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Conv2d(4, 8, 3)
    before = network.weight.detach().clone()
    optimizer = make_muon(network, 0.02, 1e-3)
    directions = torch.randn(8, 36, generator=generator) @ torch.diag(torch.logspace(0, -1, 36))
    network.weight.grad = directions.view_as(network.weight)
    network.bias.grad = torch.ones(8)
    bias = network.bias.detach().clone()
    optimizer.step()
    moved = torch.linalg.svdvals((network.weight.detach() - before).reshape(8, 36))
    assert moved.min() > 0.5 * 0.02 and moved.max() < 1.3 * 0.02  # Newton-Schulz brings them near 1, not to it.
    assert torch.allclose(bias - network.bias, torch.full((8,), 1e-3))  # the first step of Adam


def test_muon_leaves_frozen_parameters_alone():
    network = torch.nn.Linear(3, 3)
    network.weight.requires_grad_(False)
    assert [len(group["params"]) for group in make_muon(network, 0.02, 1e-3).param_groups] == [1]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_muon_computes_in_the_precision_of_the_run(mixed_precision):
    network = torch.nn.Conv2d(8, 16, 3, bias=False)
    before = network.weight.detach().clone()
    network.weight.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    exact = zero_power_via_newton_schulz_5(network.weight.grad.flatten(1), dtype=torch.float64)
    make_muon(network, 1.0, 1e-3, mixed_precision=mixed_precision).step()
    error = (before - network.weight.detach()).flatten(1).double() - exact
    assert bool(error.abs().max() > 1e-4) is (mixed_precision == "bf16")
