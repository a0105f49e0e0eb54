"""`python -m benchmarks.memory`: the peak memory of a distillation by option, and the estimate of `--dry-run`.

Every option runs two updates in its own process. In the second update, the run holds all its memory. On a CPU, the peak
counts anonymous pages, without those from before the networks were made. The text encoder is mapped from its file and
has none. On a GPU, the peak is that of torch's allocator. Weights are random. By default, the UNet has half the widths
of Stable Diffusion 2.1, and the latents have a quarter of its area.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_runtime.host.machine import thread_count

from benchmarks.latency import positive
from benchmarks.machine import Memory, cpu_name, gpu_query, watching
from benchmarks.pipelines import random_teacher

OPTIONS: dict[str, dict[str, Any]] = {
    "(defaults)": {},
    "--batch-size 1": {"batch_size": 1},
    "--gradient-checkpointing": {"gradient_checkpointing": True},
    "--shared-up-blocks 1": {"shared_up_blocks": 1},
    "--steps 1": {"steps": (1,)},
    "--fake-score full": {"fake_score": "full"},
    "--no-share-encoder": {"share_encoder": False},
    "--optimizer adam8bit": {"optimizer": "adam8bit"},
    "--mixed-precision bf16": {"mixed_precision": "bf16"},  # takes minutes on a CPU without bf16 instructions
}
ON_A_GPU = {"--ema-on-cpu": {"ema_on_cpu": True}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, and print a table in GB."""
    arguments = _parser().parse_args(argv)
    changes = {"block_out_channels": arguments.widths, "sample_size": arguments.latents}
    options = OPTIONS | (ON_A_GPU if arguments.gpu else {})
    print("| | measured, GB | estimated, GB | seconds an update |\n|---|---|---|---|", flush=True)
    for name, settings in options.items():
        settings = {"batch_size": arguments.batch} | settings
        # Every option has its own process.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            task = pool.submit(measure, arguments.model, arguments.work, changes, settings, arguments.threads)
            found = task.result()
        print(f"| `{name}` | {found.peak / 1e9:.2f} | {found.estimated / 1e9:.2f} | {found.seconds:.1f} |", flush=True)
    print(f"\n{gpu_query('name') if found.device == 'cuda' else cpu_name()}, {arguments.threads} threads")
    return 0


@dataclass(frozen=True)
class Found:
    """The cost of one option."""

    device: str  # "cuda" or "cpu"
    peak: int  # bytes
    estimated: int  # bytes
    seconds: float  # of the second update


def measure(model: str, work: Path, changes: Mapping[str, Any], settings: Mapping[str, Any], threads: int) -> Found:
    """Run two updates in this process.

    Args:
        model, work, changes: see `pipelines.random_teacher`.
        settings: of DistillConfig.
        threads: of torch.

    Returns:
        Peak, estimate and time.
    """
    import torch

    from benchmarks.training import method_update
    from tiue.distill.config import DistillConfig
    from tiue.distill.estimate import estimate
    from tiue.distill.vsd import prepare

    torch.set_num_threads(threads)
    config = DistillConfig(**settings)
    before, peak = Memory(), Memory()
    before.note(os.getpid())
    with tempfile.TemporaryDirectory() as out, watching(os.getpid(), peak):
        teacher = random_teacher(model, work, changes)
        run, method = prepare(teacher, ["a lighthouse", "a lake"], Path(out), config)
        update = method_update(run, method)  # It ends when the losses are here, so a GPU has finished, too.
        for step in range(2):
            begun = time.perf_counter()
            update(step)
            seconds = time.perf_counter() - begun
    device = run.accelerator.device.type
    taken = torch.cuda.max_memory_allocated() if device == "cuda" else peak.anonymous - before.anonymous
    estimated = estimate(teacher.unet.config, teacher.scheduler_config, config, device)
    return Found(device, taken, estimated.total_bytes, seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="The peak memory of a distillation by option."
    )
    parser.add_argument("--model", default="sd21-base", help="model of benchmarks.pipelines (default: sd21-base)")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="directory of the pipeline")
    parser.add_argument(
        "--widths", type=_numbers, default=(160, 320, 640, 640), help="of the blocks (default: 160,320,640,640)"
    )
    parser.add_argument("--latents", type=positive, default=32, help="height and width of latents (default: 32)")
    parser.add_argument("--batch", type=positive, default=4, help="samples of an update (default: 4)")
    parser.add_argument("--gpu", action="store_true", help="also measure options that matter only on a GPU")
    parser.add_argument("--threads", type=positive, default=thread_count(), help="default: all")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
