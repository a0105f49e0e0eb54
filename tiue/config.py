"""Every setting of a distillation run, in one place."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHOICES = {"fake_score": ("lora", "full"), "mixed_precision": ("no", "fp16", "bf16")}
_MAY_BE_ZERO = {"kl_weight", "null_probability", "seed", "t_min", "guidance", "fake_guidance", "shared_up_blocks"}


@dataclass(frozen=True)
class DistillConfig:
    """Settings of `tiue.distill`. Defaults are the paper's for Stable Diffusion 2.1 base, on 8 processes."""

    steps: int = 4  # decoders, N
    shared_up_blocks: int = 0  # up blocks that run once, with the encoder; none in the paper
    iterations: int = 66_500  # student updates
    batch_size: int = 8  # samples per process and micro-batch
    accumulate: int = 1  # micro-batches per update
    learning_rate: float = 1e-6  # of the student, constant
    guidance: float = 4.5  # classifier-free guidance of the teacher in VSD
    fake_guidance: float = 4.5  # of the fake score; the paper's is the teacher's
    kl_weight: float = 0.8
    t_min: int = 20  # VSD draws t from t_min..t_max
    t_max: int = 980
    fake_score: str = "lora"  # "lora": the teacher with adapters; "full": a trainable copy of it
    fake_learning_rate: float = 1e-3
    fake_steps: int = 1  # fake score updates per student update
    lora_rank: int = 64
    lora_alpha: int = 108
    null_probability: float = 0.1  # that a fake score batch has the null text
    grad_clip: float = 1.0  # largest gradient norm of each network
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 500  # iterations
    sample_every: int = 500  # iterations
    keep: int = 2  # checkpoints on disk

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value, kind = field.name, getattr(self, field.name), type(field.default)
            if type(value) is not kind and (kind, type(value)) != (float, int):  # nor is a bool an int here
                raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
            if kind is str:
                if value not in CHOICES[name]:
                    raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
            elif not 0 <= value < math.inf or (value == 0 and name not in _MAY_BE_ZERO):
                raise ValueError(f"{name} must be positive, got {value}")
        if self.t_min > self.t_max:
            raise ValueError(f"t_min must not exceed t_max, got {self.t_min} and {self.t_max}")


def read_preset(path: Path) -> dict[str, Any]:
    """The settings that a preset file (a JSON object of DistillConfig fields) names; ValueError for any other."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    known = {field.name for field in dataclasses.fields(DistillConfig)}
    if not isinstance(settings, dict) or (unknown := settings.keys() - known):
        found = ", ".join(sorted(unknown)) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{path}: expected an object of settings, found {found}")
    return settings
