"""Sizes and lengths of the recipe, as named presets. A preset holds all settings of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from evaluation.encoder.encoder_config import EncoderConfig
from tiue.distill.config import DistillConfig, read_preset

DISTILL = DistillConfig(**read_preset("emoji"))
ENCODER = EncoderConfig()


@dataclass(frozen=True)
class Preset:
    """Settings of one run of the recipe. Learning rates fall linearly to zero by default."""

    name: str
    all_concepts: bool = False  # False: the list in concepts.txt; True: every emoji drawn in all six styles
    resolution: int = 64  # pixels
    seed: int = 0

    latent_channels: int = 16
    autoencoder_widths: tuple[int, ...] = (32, 64, 96, 128)  # 4 levels: three halvings, 8 pixels per latent
    autoencoder_steps: int = 1400
    autoencoder_batch: int = 32
    autoencoder_lr: float = 1e-3

    polish_steps: int = 500  # of the image decoder alone, at the end
    polish_lr: float = 5e-4

    teacher_widths: tuple[int, ...] = (128, 192)
    teacher_layers: int = 1
    teacher_steps: int = 4800
    teacher_batch: int = 64
    teacher_lr: float = 8e-4
    teacher_ema_decay: float = 0.999
    colour_steps: int = 2000  # of the teacher's second phase, see teacher.colour_weight
    colour_lr: float = 4e-4
    null_text_probability: float = 0.1

    guidance: float = 3.0  # of the teacher when it samples the pairs of the warm start
    pair_steps: int = 12  # DDIM steps per pair
    pairs: int = 6720
    student_steps: int = 4  # decoders
    regression_steps: int = 1000
    regression_batch: int = 24
    regression_lr: float = 1e-4

    distill: DistillConfig = DISTILL

    encoder: EncoderConfig = ENCODER  # it measures pictures


CPU = Preset("cpu")
PRESETS = {
    "cpu": CPU,
    # Every stage takes seconds. This preset tests that the recipe runs, not that it learns.
    "smoke": replace(
        CPU,
        name="smoke",
        autoencoder_widths=(8, 8, 16, 16),
        autoencoder_steps=4,
        polish_steps=2,
        teacher_widths=(32, 32),
        teacher_steps=4,
        colour_steps=2,
        pair_steps=2,
        pairs=8,
        regression_steps=2,
        regression_batch=4,
        distill=replace(DISTILL, iterations=2, batch_size=2, checkpoint_every=1, sample_every=2),
        encoder=EncoderConfig(iterations=2, batch_size=8, width=8, resolution=16, embedding=16),
    ),
    # All 1,030 concepts, for one data-centre GPU in less than an hour.
    "gpu": replace(
        CPU,
        name="gpu",
        all_concepts=True,
        autoencoder_steps=20_000,
        polish_steps=10_000,
        autoencoder_batch=128,
        teacher_widths=(256, 384),
        teacher_layers=2,
        teacher_steps=40_000,
        colour_steps=10_000,
        teacher_batch=256,
        teacher_lr=4e-4,
        teacher_ema_decay=0.9995,
        pairs=60_000,
        pair_steps=25,
        regression_steps=6_000,
        regression_batch=128,
        distill=replace(DISTILL, iterations=4_000, batch_size=64, checkpoint_every=500, sample_every=500),
    ),
}
