"""Whether the GPU waits for Python, which launches its kernels: times at batch 1 and at batch 64.

If a large batch takes as long as one sample, the GPU was waiting. `large_by_one` is then near 1; without any waiting it
is near the large batch. `waits` is the share of the time at batch 1 that a CUDA graph saves.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.halves import Halves, random_halves
from benchmarks.gpu.parts import Keep, Measure, Setting
from benchmarks.gpu.timing import check_torch, milliseconds, recorded
from benchmarks.gpu.updates import measure_updates, small_teacher
from benchmarks.pipelines import EMOJI

_LARGE, _LARGE_DRY = 64, 2


def cases(setting: Setting) -> dict[str, Measure]:
    """Return the cases of the part launches. Raises CannotRun without a GPU."""
    check_torch(setting.device)
    large = _LARGE_DRY if setting.dry_run else _LARGE
    return {
        "64-pixel model, student": partial(_student, setting, "64-pixel model", large),
        "64-pixel model, update": partial(_update, setting, large),
        "SD 2.1, student": partial(_student, setting, "SD 2.1", large),
    }


@torch.inference_mode()
def _student(setting: Setting, name: str, large: int, keep: Keep) -> dict[str, float]:
    halves, seconds = _halves(setting, name), 0 if setting.dry_run else 1
    one = halves.calls(1)["student"]
    values: dict[str, float] = {"large": large, "one_ms": milliseconds(one, setting.device, seconds)}
    values["large_ms"] = milliseconds(halves.calls(large)["student"], setting.device, seconds)
    values["large_by_one"] = values["large_ms"] / values["one_ms"]
    keep(values)
    values["one_graph_ms"] = milliseconds(recorded(one, setting.device), setting.device, seconds)
    values["waits"] = 1 - values["one_graph_ms"] / values["one_ms"]
    return values


def _update(setting: Setting, large: int, keep: Keep) -> dict[str, Any]:
    values: dict[str, Any] = {"large": large}
    for name, batch in (("one", 1), ("large", large)):
        values[f"{name}_ms"] = measure_updates(small_teacher(setting), setting, batch_size=batch)["update_ms"]
        keep(values)
    return values | {"large_by_one": values["large_ms"] / values["one_ms"]}


def _halves(setting: Setting, name: str) -> Halves:
    if setting.dry_run:
        return random_halves("mini21", setting.device)
    if name == "SD 2.1":
        return random_halves("sd21-base", setting.device)
    from tiue.checkpoint import load_student

    return Halves(load_student(EMOJI).components.unet, "sd21-base", setting.device)
