"""The critic of ADD: small trained heads on the features of a frozen observer, as in projected GANs.

D(x | c) is a sum over depths of the observer and positions in the picture. The condition c joins by projection
(arXiv 1802.05637): h(features) . p(c), with an embedding of the text and one of the real picture as c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HIDDEN = 64


class Critic(nn.Module):
    """A head for each depth of the observer.

    Args:
        widths: channels of the features.
        condition: length of the condition.
    """

    def __init__(self, widths: Sequence[int], condition: int):
        super().__init__()
        self.heads = nn.ModuleList(_Head(width, condition) for width in widths)

    def forward(self, features: Sequence[Tensor], condition: Tensor) -> list[Tensor]:
        """Judge features, each (B, width, positions), under a condition (B, D): logits (B, positions) for each."""
        return [head(values, condition) for head, values in zip(self.heads, features, strict=True)]


class _Head(nn.Module):
    def __init__(self, width: int, condition: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # Features of some depths are large.
        self.body = nn.Sequential(nn.Linear(width, _HIDDEN), nn.LeakyReLU(0.2), nn.Linear(_HIDDEN, _HIDDEN))
        self.project = nn.Linear(condition, _HIDDEN)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        hidden = self.body(self.norm(features.transpose(1, 2)))
        return torch.einsum("blh,bh->bl", hidden, self.project(condition)) / math.sqrt(_HIDDEN)


def student_loss(logits: Sequence[Tensor]) -> Tensor:
    """Return the student's adversarial loss, -sum over depths of the mean of D(fake)."""
    return -torch.stack([values.mean() for values in logits]).sum()


def hinge_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Return the critic's loss, the sum over depths of mean(relu(1 - D(real))) + mean(relu(1 + D(fake)))."""
    return torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]).sum()


def gradient_penalty(logits: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """Return R1 (arXiv 1801.04406) on the features of real pictures: sum over depths, mean over samples, of |grad D|^2.

    Args:
        logits: of `Critic`, for the real features.
        features: the real features, which require gradients.
    """
    total = torch.stack([values.sum() for values in logits]).sum()
    gradients = torch.autograd.grad(total, list(features), create_graph=True)
    return torch.stack([gradient.square().flatten(1).sum(1).mean() for gradient in gradients]).sum()
