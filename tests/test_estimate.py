import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
from tolerances import ACTIVATIONS, PROPORTIONAL

from tiue.distill.average import Average
from tiue.distill.config import DistillConfig
from tiue.distill.estimate import Estimate, estimate
from tiue.distill.vsd import prepare
from tiue.schedule import closed_form
from tiue.unet import Predictor, TiUE

CONFIG = DistillConfig(batch_size=3, lora_rank=2)


def estimated(**changes: object) -> Estimate:
    components = tiny.emoji()
    return estimate(components.unet.config, components.scheduler_config, dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize("fake_score", ["lora", "full"])
def test_the_estimate_is_what_a_run_holds(tmp_path: Path, fake_score):
    found = estimated(fake_score=fake_score)
    components, config = tiny.emoji(), dataclasses.replace(CONFIG, fake_score=fake_score)
    run, method = prepare(components, ["a"], tmp_path, config)
    assert found.student_parameters == sum(p.numel() for p in method.student.parameters)
    assert found.trained_fake_parameters == sum(p.numel() for p in method.fake.parameters)
    networks = {id(module): module for module in (method.model, method.scores.network, components.unet)}.values()
    held = {p.data_ptr(): p.numel() * 4 for network in networks for p in network.parameters()}
    assert found.weights_bytes == sum(held.values())
    method.update(0, run.batch(0))
    states = [s for network in method.networks.values() for s in network.optimizer.state_dict()["state"].values()]
    assert found.optimizer_bytes == sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in states)
    average = Average(run.accelerator, method.model, config)
    assert found.ema_bytes == sum(p.nbytes for p in average.parameters)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_activations_are_those_that_a_backward_pass_keeps(precision):
    """Within a tenth, without maps of attention, which a fused kernel does not keep."""
    components = tiny.emoji()
    config = dataclasses.replace(CONFIG, mixed_precision=precision)
    found = estimate(components.unet.config, components.scheduler_config, config, "cpu").activations_bytes
    kept: dict[int, int] = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    schedule = closed_form(components.scheduler_config, 4)
    predictor = Predictor(TiUE(components.unet.requires_grad_(True), schedule, 751), share_encoder=True)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        eps = predictor(torch.randn(3, 16, 8, 8), torch.randn(3, 77, 16), schedule)
    assert found == pytest.approx(sum(kept.values()), rel=ACTIVATIONS)
    del eps


def test_what_each_option_saves():
    plain = estimated()
    assert estimated(gradient_checkpointing=True).activations_bytes < plain.activations_bytes / 2
    # On a GPU normalizations stay in float32.
    half = estimated(mixed_precision="bf16").activations_bytes
    assert plain.activations_bytes / 2 < half < plain.activations_bytes
    assert estimated(ema_on_cpu=True).ema_bytes == 0
    assert estimated(optimizer="adam8bit").optimizer_bytes == plain.optimizer_bytes / 4
    assert estimated(shared_up_blocks=1).activations_bytes < plain.activations_bytes
    assert estimated(share_encoder=False).activations_bytes > plain.activations_bytes
    assert estimated(batch_size=6).activations_bytes == pytest.approx(2 * plain.activations_bytes, rel=PROPORTIONAL)
