"""The noise process in tensors: noised latents, and what a prediction at them says of the picture and of the noise."""

from __future__ import annotations

import torch
from torch import Tensor

from tiue.schedule import NoiseSchedule


class Diffusion:
    """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, for a network that predicts eps, or v.

    v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0 (arXiv 2202.00512). Timesteps t are int64 (B,) or 0-dimensional. Latents
    and predictions are float (B, C, h, w).

    Args:
        schedule: the noise process.
        device: of the timesteps.
    """

    def __init__(self, schedule: NoiseSchedule, device: torch.device):
        self.abar = schedule.alphas_cumprod.float().to(device)
        self._v = schedule.prediction_type == "v_prediction"

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), both (B, 1, 1, 1)."""
        abar = self.abar[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def noised(self, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return z_t."""
        alpha, sigma = self.scales(t)
        return alpha * z_0 + sigma * noise

    def target(self, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the right prediction at z_t: eps, or sqrt(abar_t) eps - sqrt(1 - abar_t) z_0, for v."""
        alpha, sigma = self.scales(t)
        return alpha * noise - sigma * z_0 if self._v else noise

    def noise(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the noise that a prediction at z_t implies: eps, or sqrt(abar_t) v + sqrt(1 - abar_t) z_t."""
        alpha, sigma = self.scales(t)
        return alpha * prediction + sigma * z_t if self._v else prediction

    def picture(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the latents z_0 that a prediction at z_t implies: sqrt(abar_t) z_t - sqrt(1 - abar_t) v, for v."""
        alpha, sigma = self.scales(t)
        return alpha * z_t - sigma * prediction if self._v else (z_t - sigma * prediction) / alpha
