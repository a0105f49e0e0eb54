"""The list of parts, the most valuable second first."""

import pkgutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.conditions import gpu_field

Keep = Callable[[dict[str, Any]], None]  # writes values of a case that is not done yet
Measure = Callable[[Keep], dict[str, Any]]  # measures one case, and returns its values


@dataclass(frozen=True)
class Setting:
    """What all parts are told."""

    dry_run: bool  # measure tiny models on the CPU
    work: Path  # directory of pipelines and bundles, which are made once
    seconds: float  # time limit of the part
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """The device of torch."""
        return "cpu" if self.dry_run else "cuda"

    @property
    def gpu(self) -> str:
        """The name of the GPU, "" in a dry run. Raises CannotRun if there is none."""
        return "" if self.dry_run else gpu_field("name")

    @property
    def seconds_left(self) -> float:
        """The time until the part is stopped."""
        return self.started + self.seconds - time.monotonic()


@dataclass(frozen=True)
class Part:
    """One part of the benchmark."""

    about: str  # what it measures
    needs_seconds: int  # it is not begun with less time left; a guess
    function: str  # module:name of a function from a Setting to the cases, in their order; it may raise CannotRun

    def cases(self, setting: Setting) -> dict[str, Measure]:
        """Return the cases, by name."""
        return pkgutil.resolve_name(self.function)(setting)


PARTS = {
    "network": Part(
        "SD 2.1's UNet in fp16: one full pass, and the halves of a student", 20, "benchmarks.gpu.halves:cases"
    ),
    "launches": Part("Whether the GPU waits for Python: batch 1 and 64", 20, "benchmarks.gpu.launches:cases"),
    "training": Part("Updates of a distillation at SD 2.1's size in bf16", 60, "benchmarks.gpu.updates:cases"),
    "tests": Part("The tests with the mark gpu", 20, "benchmarks.gpu.marked:cases"),
    "cuda": Part("Pictures by PyTorch, diffusers in fp16 and CUDA", 60, "benchmarks.gpu.pictures:on_cuda"),
    "tensorrt": Part("Pictures by TensorRT", 180, "benchmarks.gpu.pictures:on_tensorrt"),
}
