"""The quality of pictures: a classifier trained on the drawings names their concept, and its features give a distance.

Text-to-image models are usually compared by CLIP score and FID, whose networks are made for photographs of 200 pixels
and more. Here, the accuracy stands for the CLIP score: does the picture show the prompt? A Frechet distance between
features of pictures and drawings stands for FID: are both sets alike in quality and variety?
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.emoji.autoencoder import to_pixels
from recipes.emoji.data import Drawings
from recipes.emoji.presets import Preset
from recipes.emoji.stage import device, minimize
from tiue.files import written_whole

FEATURES = 128


class Classifier(nn.Module):
    """Pixels (n, 3, 64, 64) in [-1, 1] => logits over concepts (n, K)."""

    def __init__(self, concepts: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, FEATURES)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, 2, 1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
                nn.Conv2d(b, b, 3, 1, 1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
            )
            for a, b in pairwise(widths)
        )
        self.head = nn.Linear(FEATURES, concepts)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the averages (n, 128), the input of the last layer."""
        for stage in self.stages:
            pixels = stage(pixels)
        return pixels.mean(dim=(2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits (n, K)."""
        return self.head(self.features(pixels))


def classifier(preset: Preset, drawings: Drawings, path: Path) -> Classifier:
    """Train (once) and load the classifier. It never sees held-out drawings, so it can be checked on them."""
    torch.manual_seed(preset.seed)
    model = Classifier(len(drawings.captions)).to(device())
    if not path.exists():
        pixels = to_pixels(drawings.images[~drawings.held_out])
        concept = torch.from_numpy(drawings.concept[~drawings.held_out])

        def loss(generator: torch.Generator, count: int) -> Tensor:
            rows = torch.randint(len(pixels), (count,), generator=generator)
            x = augment(pixels[rows], generator).to(device())
            return F.cross_entropy(model(x).float(), concept[rows].to(x.device), label_smoothing=0.1)

        minimize(
            model,
            loss,
            path.parent / "runs/judge",
            weight_decay=0.05,
            iterations=preset.judge_steps,
            batch_size=preset.judge_batch,
            learning_rate=2e-3,
            ema_decay=0.0,
            seed=preset.seed,
        )
        with written_whole(path) as temporary:
            save_file(model.state_dict(), temporary)
    model.load_state_dict(load_file(path))
    return model.eval()


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Augment pictures: mirror them, shift them by up to 6 pixels, scale each colour, and add a little noise."""
    n = len(pixels)
    angle = torch.zeros(n, 2, 3)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    zoom = 1 + 0.3 * (torch.rand(n, generator=generator) - 0.5)
    angle[:, 0, 0], angle[:, 1, 1] = mirror * zoom, zoom
    angle[:, :, 2] = 0.4 * (torch.rand(n, 2, generator=generator) - 0.5)
    moved = F.grid_sample(
        pixels - 1, F.affine_grid(angle, list(pixels.shape), align_corners=False), align_corners=False
    )
    gain = 1 + 0.4 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    return moved * gain + 1 + 0.05 * torch.randn(pixels.shape, generator=generator)


@torch.no_grad()
def judge(model: Classifier, images: np.ndarray, concept: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Classify pictures.

    Args:
        model: the classifier.
        images: uint8 (n, H, W, 3).
        concept: the concepts of the prompts, int64 (n,).

    Returns:
        {"top1", "top5"} as fractions, and features (n, 128).
    """
    pixels = to_pixels(images)
    features = torch.cat([model.features(part.to(device())) for part in pixels.split(256)])
    order = model.head(features).argsort(dim=1, descending=True).cpu()
    hit = order[:, :5] == torch.from_numpy(concept)[:, None]
    scores = {"top1": hit[:, 0].float().mean().item(), "top5": hit.any(dim=1).float().mean().item()}
    return scores, features.cpu().double().numpy()
