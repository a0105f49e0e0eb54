"""Every setting of a distillation run, in one place, and the presets that name some of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHOICES = {"fake_score": ("lora", "full"), "mixed_precision": ("no", "fp16", "bf16"), "optimizer": ("adam", "adam8bit")}
_MAY_BE_ZERO = {"kl_weight", "clip_weight", "null_probability", "seed", "t_min", "guidance", "fake_guidance"}
_MAY_BE_ZERO |= {"shared_up_blocks"}
_FRACTIONS = {"ema_decay", "null_probability"}
_PRESETS = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class DistillConfig:
    """Settings of `tiue.distill`. Defaults are the paper's for Stable Diffusion 2.1 base, on 8 processes."""

    # The student
    steps: tuple[int, ...] = (4,)  # decoders, N; of several, each update draws one
    shared_up_blocks: int = 0  # up blocks that run once, with the encoder; none in the paper
    share_encoder: bool = True  # False: the control, N full UNets on the same noise; it cannot be exported
    # The run
    iterations: int = 66_500  # student updates
    batch_size: int = 8  # samples per process and micro-batch
    accumulate: int = 1  # micro-batches per update
    learning_rate: float = 1e-6  # of the student, constant
    grad_clip: float = 1.0  # largest gradient norm of each network
    ema_decay: float = 0.999
    ema_every: int = 1  # updates between two averagings
    seed: int = 0
    # The losses
    guidance: float = 4.5  # classifier-free guidance of the teacher in VSD
    fake_guidance: float = 4.5  # of the fake score; the paper's is the teacher's
    t_min: int = 20  # VSD draws t from t_min..t_max
    t_max: int = 980
    kl_weight: float = 0.8
    clip_weight: float = 0.0  # falls linearly to 0 over the run
    # The fake score
    fake_score: str = "lora"  # "lora": the teacher with adapters; "full": a trainable copy of it
    fake_learning_rate: float = 1e-3
    fake_steps: int = 1  # fake score updates per student update
    lora_rank: int = 64
    lora_alpha: int = 108
    null_probability: float = 0.1  # that a fake score batch has the null text
    # Speed and memory
    mixed_precision: str = "no"
    optimizer: str = "adam"  # "adam8bit": bitsandbytes, not with FSDP
    text_cache: bool = True  # text embeddings are computed once and kept on the disk
    gradient_checkpointing: bool = False
    ema_on_cpu: bool = False
    channels_last: bool = False
    compile: bool = False
    # Files
    checkpoint_every: int = 500  # iterations
    sample_every: int = 500  # iterations
    keep: int = 2  # checkpoints on disk

    def __post_init__(self):
        steps = (self.steps,) if type(self.steps) is int else self.steps
        if not isinstance(steps, tuple | list) or not steps or not all(type(n) is int and n > 0 for n in steps):
            raise ValueError(f"steps must be positive whole numbers, got {self.steps!r}")
        object.__setattr__(self, "steps", tuple(sorted(set(steps), reverse=True)))
        for field in dataclasses.fields(self):
            name, value, kind = field.name, getattr(self, field.name), type(field.default)
            if kind is tuple:
                continue
            if type(value) is not kind and (kind, type(value)) != (float, int):  # nor is a bool an int here
                raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
            if kind is str:
                if value not in CHOICES[name]:
                    raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
            elif kind is not bool and (not 0 <= value < math.inf or (value == 0 and name not in _MAY_BE_ZERO)):
                expected = "a number from 0 on" if name in _MAY_BE_ZERO else "a positive number"
                raise ValueError(f"{name} must be {expected}, got {value}")
            if name in _FRACTIONS and value > 1:
                raise ValueError(f"{name} must be at most 1, got {value}")
        if self.t_min > self.t_max:
            raise ValueError(f"t_min must not exceed t_max, got {self.t_min} and {self.t_max}")
        if self.shared_up_blocks and not self.share_encoder:
            raise ValueError("shared_up_blocks needs a shared encoder, which share_encoder=False has not")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> DistillConfig:
        """The settings among `settings`, which may hold other things; defaults for those that are not there."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in names})


def preset_names() -> list[str]:
    """The presets that come with the package: `presets/NAME.json`."""
    return sorted(path.stem for path in _PRESETS.glob("*.json"))


def read_preset(preset: str | Path) -> dict[str, Any]:
    """The settings that a preset names, a name of `preset_names` or a JSON file of DistillConfig fields.

    Raises ValueError for any other.
    """
    path = _PRESETS / f"{preset}.json" if str(preset) in preset_names() else Path(preset)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = f"; presets are {', '.join(preset_names())}" if not path.suffix else ""
        raise ValueError(f"{path}: {error.strerror}{known}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    known = {field.name for field in dataclasses.fields(DistillConfig)}
    if not isinstance(settings, dict) or (unknown := settings.keys() - known):
        found = ", ".join(sorted(unknown)) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{path}: expected an object of settings, found {found}")
    return settings
