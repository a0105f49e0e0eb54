"""Updates of a distillation with random weights in bf16: how fast, and how much memory."""

import gc
import math
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import Keep, Measure, Setting
from benchmarks.gpu.timing import check_torch, reset_peak
from benchmarks.pipelines import EMOJI, random_teacher, write_pipeline
from benchmarks.training import CAPTIONS, method_update, timed_updates
from tiue.checkpoint import load_student
from tiue.components import Components, load_components
from tiue.distill.config import DistillConfig
from tiue.distill.estimate import estimate
from tiue.distill.vsd import prepare

_UPDATES = 6  # timed, after a first one that does not count
# Settings of DistillConfig by the name of the case. Compiling takes minutes, and comes last.
_SETTINGS: dict[str, dict[str, Any]] = {
    "batch 8": {"batch_size": 8},
    "batch 8, channels last": {"batch_size": 8, "channels_last": True},
    "batch 1": {"batch_size": 1},
    "batch 8, gradient checkpointing": {"batch_size": 8, "gradient_checkpointing": True},
    "batch 32, gradient checkpointing": {"batch_size": 32, "gradient_checkpointing": True},
    "batch 32": {"batch_size": 32},
    "batch 8, compiled": {"batch_size": 8, "compile": True},
}
_SETTINGS_DRY: dict[str, dict[str, Any]] = {
    "batch 2, channels last, gradient checkpointing": {
        "batch_size": 2,
        "channels_last": True,
        "gradient_checkpointing": True,
    },
}


def cases(setting: Setting) -> dict[str, Measure]:
    """Return the cases of the part training. Raises CannotRun without a GPU."""
    check_torch(setting.device)
    settings = _SETTINGS_DRY if setting.dry_run else _SETTINGS
    return {name: partial(_measure, setting, options) for name, options in settings.items()}


def _measure(setting: Setting, options: dict[str, Any], keep: Keep) -> dict[str, Any]:
    teacher = _tiny_teacher(setting) if setting.dry_run else _large_teacher(setting)
    unet, scheduler = teacher.unet.config, teacher.scheduler_config  # The teacher is changed in place.
    try:
        values = measure_updates(teacher, setting, **options)
    except torch.OutOfMemoryError:
        return options | {"out_of_memory": True}
    keep(values)
    estimated = estimate(unet, scheduler, _config(options), setting.device)
    return values | {"estimated_gb": estimated.total_bytes / 1e9}


def measure_updates(teacher: Components, setting: Setting, **options: Any) -> dict[str, Any]:
    """Time the updates of a distillation.

    Args:
        teacher: the model. It is changed in place.
        setting: of all parts.
        **options: settings of DistillConfig.

    Returns:
        Median, least and most milliseconds of an update, and updates and samples in a second. On a GPU, the peak memory
        of torch's allocator in GB. Also the options.

    Raises:
        FloatingPointError: a loss is not finite.
        torch.OutOfMemoryError: the GPU has too little memory.
    """
    config = _config(options)
    gc.collect()
    reset_peak(setting.device)
    captions = CAPTIONS[:2] if setting.dry_run else CAPTIONS
    with tempfile.TemporaryDirectory() as out:
        update = method_update(*prepare(teacher, captions, Path(out), config))
        losses, seconds = timed_updates(update, 1 if setting.dry_run else _UPDATES)
    if not all(math.isfinite(value) for of_one in losses for value in of_one.values()):
        raise FloatingPointError(f"expected finite losses, got {losses[-1]}")
    median = statistics.median(seconds)
    values = options | {
        "update_ms": 1000 * median,
        "least_ms": 1000 * min(seconds),
        "most_ms": 1000 * max(seconds),
        "updates_per_s": 1 / median,
        "samples_per_s": config.batch_size / median,
    }
    if setting.device == "cuda":
        values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return values


def small_teacher(setting: Setting) -> Components:
    """Load the 64-pixel model as a teacher; in a dry run, a smaller one."""
    return _tiny_teacher(setting) if setting.dry_run else load_student(EMOJI).components


def _large_teacher(setting: Setting) -> Components:
    directory = setting.work / "sd21-base"
    if not directory.exists():
        write_pipeline("sd21-base", directory)
    return load_components(directory)


def _tiny_teacher(setting: Setting) -> Components:
    return random_teacher("mini21", setting.work, {"sample_size": 8})


def _config(options: dict[str, Any]) -> DistillConfig:
    return DistillConfig(mixed_precision="bf16", **options)
