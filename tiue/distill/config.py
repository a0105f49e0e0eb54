"""Every setting of a distillation run, in one place, and the presets, which set some of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue.settings import check, setting

if TYPE_CHECKING:
    import torch

LARGEST_SEED = 10**12  # The order of captions is seeded by a million times as much, and torch's seeds end at 2**64.
_PRESETS = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class RunConfig:
    """Settings of the training loop, for any method. Defaults are the paper's, on 8 processes.

    Raises:
        ValueError: a setting is of another type or out of range.
    """

    iterations: int = setting(66_500, "updates of the student", group="the run", at_least=1)
    batch_size: int = setting(8, "samples per process and micro-batch", at_least=1)
    accumulate: int = setting(1, "micro-batches per update", at_least=1)
    learning_rate: float = setting(1e-6, "learning rate of the student", above=0)
    learning_rate_decay: str = setting(
        "none", "linear: all learning rates fall to 0 over the run; none: they are constant", choices=["none", "linear"]
    )
    grad_clip: float = setting(1.0, "largest gradient norm of each network", above=0)
    ema_decay: float = setting(
        0.999, "decay per update of the student's average, which is saved; 0: no average", at_least=0, at_most=1
    )
    ema_every: int = setting(1, "updates between two averagings", at_least=1)
    seed: int = setting(
        0, "the same seed, settings and machine give the same weights", at_least=0, at_most=LARGEST_SEED
    )

    mixed_precision: str = setting(
        "no",
        "autocast: bf16 is 2-3x faster than no on GPUs and on CPUs with bf16 instructions",
        group="speed and memory",
        choices=["no", "fp16", "bf16"],
    )
    ema_on_cpu: bool = setting(False, "keep the student's average in the computer's memory")

    checkpoint_every: int = setting(500, "updates between checkpoints", group="files", at_least=1)
    sample_every: int = setting(500, "updates between sample grids", at_least=1)
    keep: int = setting(2, "checkpoints kept on the disk", at_least=1)

    def __post_init__(self):
        check(self)

    def changeable(self) -> set[str]:
        """Name the settings that a resumed run may change, because the weights do not depend on them."""
        names = {"ema_on_cpu", "checkpoint_every", "sample_every", "keep"}
        return names if self.learning_rate_decay == "linear" else names | {"iterations"}


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """Settings of a distillation. Defaults are the paper's for Stable Diffusion 2.1 base, on 8 processes.

    Raises:
        ValueError: a setting is of another type or out of range, or settings contradict each other.
    """

    steps: tuple[int, ...] = setting(
        (4,),
        "decoders N of the student, each at one DDIM timestep of the teacher; with several counts, for example 4,2,1, "
        "each update draws one, and one student serves all",
        group="the student",
        at_least=1,
    )
    shared_up_blocks: int = setting(
        0, "up blocks, coarsest first, that run once with the encoder: faster, less like the teacher", at_least=0
    )
    share_encoder: bool = setting(
        True, "run the encoder once (the method); off: N full UNets, a control that cannot be exported"
    )

    guidance: float = setting(
        4.5, "classifier-free guidance of the teacher in the VSD loss", group="the losses", at_least=0
    )
    fake_guidance: float = setting(
        4.5, "guidance of the fake score in the VSD loss; 1 leads the student to the guided teacher", at_least=0
    )
    t_min: int = setting(20, "smallest timestep at which VSD compares the scores", at_least=0)
    t_max: int = setting(980, "largest timestep at which VSD compares the scores", at_least=0)
    kl_weight: float = setting(
        0.8, "weight of the KL term on the predicted noise; 0 leaves it out", at_least=0, aliases=["kl"]
    )
    clip_weight: float = setting(
        0.0, "weight of the CLIP loss at the start, falling to 0 (paper: 0.1); needs a CLIP model", at_least=0
    )

    fake_score: str = setting(
        "lora",
        "lora: the teacher with adapters; full: a trainable copy of the teacher (more memory, learns faster)",
        group="the fake score",
        choices=["lora", "full"],
    )
    fake_learning_rate: float = setting(1e-3, "learning rate of the fake score", above=0)
    fake_steps: int = setting(1, "updates of the fake score per update of the student", at_least=1)
    lora_rank: int = setting(64, "rank of the adapters", at_least=1)
    lora_alpha: int = setting(108, "scale of the adapters", at_least=1)
    null_probability: float = setting(
        0.1, "probability that the fake score trains a batch on the empty prompt", at_least=0, at_most=1
    )

    optimizer: str = setting(
        "adam",
        "adam8bit keeps Adam's averages in 8 bits (bitsandbytes; not with FSDP)",
        group="speed and memory",
        choices=["adam", "adam8bit"],
    )
    text_cache: bool = setting(
        True, "compute text embeddings once and keep them on the disk, so that the text encoder leaves the GPU"
    )
    gradient_checkpointing: bool = setting(False, "keep fewer activations and compute them again: less memory, slower")
    channels_last: bool = setting(False, "memory layout of convolutions; faster on GPUs in half precision")
    compile: bool = setting(False, "torch.compile: slow first updates, faster ones after")

    def __post_init__(self):
        if type(self.steps) is int:
            object.__setattr__(self, "steps", (self.steps,))
        super().__post_init__()
        if not self.steps:
            raise ValueError("`steps` must name at least one number of steps, got none")
        object.__setattr__(self, "steps", tuple(sorted(set(self.steps), reverse=True)))
        if self.t_min > self.t_max:
            raise ValueError(f"`t_min` must not exceed `t_max`, got {self.t_min} and {self.t_max}")
        if self.shared_up_blocks and not self.share_encoder:
            raise ValueError("`shared_up_blocks` needs a shared encoder: turn `share_encoder` on, or leave it out")

    def changeable(self) -> set[str]:
        """Name the settings that a resumed run may change. The weight of the CLIP loss depends on `iterations`."""
        names = super().changeable() | {"gradient_checkpointing"}
        return names - {"iterations"} if self.clip_weight else names


def autocast_dtype(mixed_precision: str) -> torch.dtype | None:
    """Return the type of autocast's arithmetic, or None for the setting "no"."""
    import torch  # Imported late: --help does not need it.

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)


def preset_names(directory: Path = _PRESETS) -> list[str]:
    """List the presets that come with the package, `presets/NAME.json`."""
    return sorted(path.stem for path in directory.glob("*.json"))


def read_preset(
    preset: str | Path, config: type[RunConfig] = DistillConfig, directory: Path = _PRESETS
) -> dict[str, Any]:
    """Read a preset.

    Args:
        preset: a name of `preset_names`, or the path of a JSON file with fields of `config`.
        config: the class of the settings.
        directory: the folder of the presets.

    Returns:
        Settings by name.

    Raises:
        ValueError: the file is missing, is not JSON, or holds something other than settings.
    """
    named = preset_names(directory)
    path = directory / f"{preset}.json" if str(preset) in named else Path(preset)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = f"; presets are {', '.join(named)}" if not path.suffix else ""
        raise ValueError(f"{path}: {error.strerror}{known}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    known = {field.name for field in fields(config)}
    if not isinstance(settings, dict) or (unknown := settings.keys() - known):
        found = ", ".join(sorted(unknown)) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{path}: expected an object of settings, found {found}")
    return settings
