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
    resolution: int = 128  # pixels
    seed: int = 0

    latent_channels: int = 32
    autoencoder_widths: tuple[int, ...] = (32, 32, 64, 128, 256)  # 5 levels: four halvings, 16 pixels per latent
    autoencoder_steps: int = 1800
    autoencoder_batch: int = 32
    autoencoder_muon: float = 0.02  # learning rate of Muon, for matrices and convolutions
    autoencoder_lr: float = 1e-3  # of AdamW, for the rest
    autoencoder_ema_decay: float = 0.99

    polish_steps: int = 500  # of the image decoder alone, after the teacher
    polish_lr: float = 5e-4

    teacher_widths: tuple[int, ...] = (192, 320)
    teacher_layers: int = 1
    teacher_steps: int = 5600
    teacher_batch: int = 128
    teacher_muon: float = 0.02
    teacher_lr: float = 8e-4
    teacher_ema_decay: float = 0.999
    null_text_probability: float = 0.1

    guidance: float = 3.0  # of the teacher when it samples the pairs of the warm start
    pair_steps: int = 12  # DDIM steps per pair
    pair_batch: int = 64
    pairs: int = 9600
    regression_steps: int = 2000
    regression_batch: int = 32
    regression_lr: float = 1e-4

    distill: DistillConfig = DISTILL

    fit_pairs: int = 2304  # pictures of the student, from whose errors the image decoder learns
    fit_steps: int = 439
    fit_batch: int = 16
    fit_muon: float = 0.003

    encoder: EncoderConfig = ENCODER  # it measures pictures


CPU = Preset("cpu")
PRESETS = {
    "cpu": CPU,
    # Every stage takes seconds. This preset tests that the recipe runs, not that it learns.
    "smoke": replace(
        CPU,
        name="smoke",
        resolution=64,
        latent_channels=16,
        autoencoder_widths=(8, 8, 16, 16),
        autoencoder_steps=4,
        autoencoder_batch=4,
        polish_steps=2,
        teacher_widths=(32,),
        teacher_steps=4,
        teacher_batch=4,
        pair_steps=2,
        pairs=8,
        regression_steps=2,
        regression_batch=4,
        distill=replace(DISTILL, iterations=2, batch_size=2, sample_every=2),
        fit_pairs=8,
        fit_steps=2,
        fit_batch=4,
        encoder=EncoderConfig(iterations=2, batch_size=8, width=8, resolution=16, embedding=16),
    ),
    # From nothing in less than an hour of two cores: a source for the comparison of methods.
    "small": replace(
        CPU,
        name="small",
        resolution=64,
        latent_channels=16,
        autoencoder_widths=(32, 32, 64, 128),
        autoencoder_steps=1000,
        polish_steps=150,
        teacher_widths=(64, 128),
        teacher_steps=2600,
        guidance=2.0,
        pairs=6400,
        regression_steps=1500,
        regression_lr=3e-4,
        encoder=EncoderConfig(iterations=400, width=16, resolution=48),
    ),
    # The shipped model: all concepts that were found then, eight minutes of one NVIDIA H200. Its last stages ran on
    # two cores.
    "gpu": replace(
        CPU,
        name="gpu",
        all_concepts=True,
        autoencoder_steps=1653,
        autoencoder_batch=128,
        polish_steps=310,
        teacher_steps=2776,
        teacher_batch=1024,
        guidance=2.0,
        pair_steps=16,
        pair_batch=1024,
        pairs=60_000,
        regression_steps=904,
        regression_batch=512,
        regression_lr=3e-4,
        distill=replace(DISTILL, text_cache=False),
    ),
}
