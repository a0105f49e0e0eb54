import pytest
import torch

from tiue.losses import clip_loss, fake_score_loss, kl_loss, vsd_loss


def test_vsd_gradient_is_the_weighted_score_difference_over_numel():
    generator = torch.Generator().manual_seed(0)
    x0, teacher, fake = (torch.randn(3, 4, 5, 6, generator=generator) for _ in range(3))
    sigma2 = torch.tensor([0.1, 0.5, 0.9])
    x0.requires_grad_()
    vsd_loss(x0, teacher, fake, sigma2).backward()
    expected = sigma2.view(-1, 1, 1, 1) * (teacher - fake) / x0.numel()
    torch.testing.assert_close(x0.grad, expected, atol=1e-7, rtol=1e-5)


def test_vsd_sends_no_gradient_into_the_scores():
    x0, teacher, fake = (torch.randn(2, 4, 3, 3, requires_grad=True) for _ in range(3))
    vsd_loss(x0, teacher, fake, torch.ones(2)).backward()
    assert x0.grad is not None and teacher.grad is None and fake.grad is None


def _standard(shape: tuple[int, ...]) -> torch.Tensor:
    """Maps whose mean is exactly 0 and whose unbiased variance is exactly 1 (up to float32)."""
    maps = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).flatten(2)
    maps = (maps - maps.mean(2, keepdim=True)) / maps.std(2, keepdim=True)
    return maps.view(shape)


def test_kl_is_zero_for_standard_normal_maps():
    assert kl_loss(_standard((4, 2, 4, 8, 8))).abs() < 1e-6


@pytest.mark.parametrize("mu", [0.5, -1.0])
@pytest.mark.parametrize("v", [1.0, 0.25, 4.0])
def test_kl_is_the_formula_summed_over_steps_and_averaged_over_the_batch(mu, v):
    steps, batch = 4, 3
    maps = _standard((steps, batch, 4, 8, 8)) * v**0.5 + mu
    one = 0.5 * (mu**2 + v - 1 - torch.tensor(v).log().item())
    assert kl_loss(maps).item() == pytest.approx(steps * one, rel=1e-5)


def test_kl_grows_with_mean_and_with_variance():
    maps = _standard((1, 1, 4, 8, 8))
    for change in (lambda k: maps + k, lambda k: maps * (1 + k)):
        values = [kl_loss(change(k)).item() for k in (0.0, 0.5, 1.0, 2.0)]
        assert values == sorted(values) and values[0] < values[1] < values[3]


def test_fake_score_loss_weights_each_sample_by_its_alpha():
    eps, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    loss = fake_score_loss(eps, noise, torch.tensor([0.6, 0.8]))
    assert loss.item() == pytest.approx((0.36 + 0.64) / 2)


def test_clip_loss_stops_at_its_margin():
    text = torch.tensor([[1.0, 0.0]])
    assert clip_loss(text, torch.tensor([[1.0, 0.0]])).item() == 0.0
    assert clip_loss(text, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(0.35)
