"""The losses of the method, as pure functions. Equations: arXiv 2505.21960; symbols as in the paper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MARGIN = 0.35  # the paper's, on CLIP's scale


def vsd_loss(x0: Tensor, teacher_eps: Tensor, fake_eps: Tensor, sigma2: Tensor) -> Tensor:
    """Variational score distillation: its gradient with respect to `x0` is sigma_t^2 (eps_teacher - eps_fake) / numel.

    Args:
        x0: the student's latents z_0, float (B, C, h, w), with gradient.
        teacher_eps: noise predicted by the teacher on noised x0, with guidance, (B, C, h, w).
        fake_eps: noise predicted by the fake score on the same, with guidance, (B, C, h, w).
        sigma2: sigma_t^2 = 1 - abar_t of every sample, (B,).

    Returns:
        0.5 * mean((x0 - sg(x0 - grad))^2), a scalar.
    """
    grad = sigma2.view(-1, 1, 1, 1) * (teacher_eps - fake_eps).detach()
    return 0.5 * F.mse_loss(x0, (x0 - grad).detach())


def kl_loss(eps: Tensor) -> Tensor:
    """KL(N(mu, v) || N(0, 1)) of every predicted noise map, summed over steps and averaged over the batch.

    Args:
        eps: predicted noise, float (N, B, C, h, w); mu and v are the mean and the unbiased variance over (C, h, w).

    Returns:
        sum over N, mean over B, of 0.5 (mu^2 + v - 1 - ln v), a scalar.
    """
    mu, v = noise_statistics(eps)
    return 0.5 * (mu.square() + v - 1 - v.log()).sum(0).mean()


def noise_statistics(eps: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted noise (N, B, C, h, w) => its mean and its unbiased variance over (C, h, w), both (N, B)."""
    v, mu = torch.var_mean(eps.flatten(2).float(), dim=2)
    return mu, v


def fake_score_loss(eps: Tensor, noise: Tensor, sqrt_alpha: Tensor) -> Tensor:
    """Denoising loss of the fake score: mse(sqrt(abar_t) eps_fake, sqrt(abar_t) noise).

    Args:
        eps: noise predicted by the fake score, (B, C, h, w).
        noise: the noise that was added, (B, C, h, w).
        sqrt_alpha: sqrt(abar_t) of every sample, (B,).

    Returns:
        The loss, a scalar.
    """
    weight = sqrt_alpha.view(-1, 1, 1, 1)
    return F.mse_loss(weight * eps.float(), weight * noise)


def clip_loss(text: Tensor, image: Tensor, margin: float = CLIP_MARGIN) -> Tensor:
    """CLIP loss of projected embeddings, both (B, D) => relu(margin - mean cos(text, image)), a scalar."""
    return F.relu(margin - F.cosine_similarity(text, image, dim=-1).mean())
