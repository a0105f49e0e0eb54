"""The command line of the trainer: parse, load, distill."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tiue.distill.command import status_of
from tiue.distill.config import DistillConfig, preset_names, read_preset
from tiue.settings import add_flags, given

_DESCRIPTION = """\
Distill a text-to-image diffusion model into a student that makes a picture in one pass: its encoder runs once, its
decoder at N timesteps in parallel. You need a teacher (a diffusers pipeline directory) and captions; no pictures."""

_EXAMPLE = """\
files of a run:
  config.json             the settings, and fingerprints of the teacher, the prompts and the initial student
  losses.csv, tensorboard losses, gradient norms, mean and variance of the predicted noise, speed; every update
  samples/                grids of the sample prompts, by the averaged student
  checkpoints/            states from which the run resumes
  prompts/, text/         the captions, each once, and their text embeddings
  student.safetensors     at the end: the averaged student, for python -m export.onnx --ckpt
  report.md               at the end: settings, losses, plots

stopping and resuming:
  The same command resumes from the newest undamaged checkpoint. The weights are then those of an uninterrupted run.
  SIGTERM and Ctrl-C write a checkpoint first. Ctrl-C after that does not wait. Changed settings are refused and named.

several GPUs, several machines, FSDP:
  accelerate config                     asks once for your hardware
  accelerate launch -m tiue ...         takes the same flags; --batch-size is per process

examples:
  python -m tiue --preset tiny --teacher DIR --prompts captions.txt --out runs/try
  accelerate launch -m tiue --preset sd21-base --teacher DIR --prompts journeydb/ --out runs/sd21
  python -m tiue --preset sd21-base ... --dry-run     print settings, parameters, memory and epochs, and stop
"""


def parser() -> argparse.ArgumentParser:
    """Make the parser: flags for files, then one for every setting of DistillConfig."""
    result = argparse.ArgumentParser(
        prog="python -m tiue",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--teacher", required=True, metavar="DIR", help="a diffusers pipeline directory")
    result.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="PATH",
        help="captions: .txt (one a line), .jsonl, .parquet, or a directory of such files",
    )
    result.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory of the run")
    result.add_argument(
        "--prompt-field",
        metavar="NAME",
        help="field that holds the caption (default: the first of prompt, caption, text, Task2.Caption)",
    )
    result.add_argument(
        "--init", type=Path, metavar="FILE", help="start from this student.safetensors instead of the teacher's weights"
    )
    result.add_argument(
        "--preset",
        metavar="NAME",
        help=f"settings, which flags override: {', '.join(preset_names())}, or your own JSON file",
    )
    result.add_argument(
        "--sample-prompts", type=Path, metavar="FILE", help="prompts of the sample grid (default: the first 8)"
    )
    result.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP model of transformers, for --clip-weight")
    result.add_argument("--tiny-vae", type=Path, metavar="DIR", help="an AutoencoderTiny, for --clip-weight")
    result.add_argument(
        "--dry-run", action="store_true", help="print settings, parameters, memory and epochs, and stop"
    )
    add_flags(result, DistillConfig)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. On failure, print the reason as one line on stderr.

    Returns:
        0; 1 if the training diverged; 2 if it cannot run; 128 plus the number of the signal that stopped it.
    """
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="python -m tiue: %(message)s")
    logging.getLogger("tiue").setLevel(logging.INFO)
    # At import, diffusers reports that optimum-onnx shares a namespace with optimum.
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    return status_of("python -m tiue", lambda: _run(arguments), DistillConfig)


def _run(arguments: argparse.Namespace) -> None:
    settings = read_preset(arguments.preset) if arguments.preset else {}
    config = DistillConfig(**settings | given(arguments, DistillConfig))
    if len({arguments.clip is not None, arguments.tiny_vae is not None, config.clip_weight > 0}) > 1:
        raise ValueError("`clip_weight`, --clip and --tiny-vae need each other")
    if arguments.dry_run:
        _dry_run(arguments, config)
    else:
        _distill(arguments, config)


def _dry_run(arguments: argparse.Namespace, config: DistillConfig) -> None:
    from tiue.components import read_configs
    from tiue.distill.estimate import estimate
    from tiue.distill.prompt_store import Prompts, store_prompts
    from tiue.prompts import read_prompts

    unet, scheduler = read_configs(arguments.teacher)
    with tempfile.TemporaryDirectory() as directory:
        store_prompts(read_prompts(arguments.prompts, arguments.prompt_field), Path(directory))
        prompts = len(Prompts(Path(directory)))
    cost = estimate(unet, scheduler, config)
    for name, value in dataclasses.asdict(config).items():
        print(f"{name:24} {_comma_separated(value) if isinstance(value, tuple) else value}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = config.batch_size * config.accumulate * processes
    gigabytes = {
        "weights": cost.weights_bytes,
        "gradients": cost.gradients_bytes,
        "Adam": cost.optimizer_bytes,
        "EMA": cost.ema_bytes,
        "activations": cost.activations_bytes,
    }
    print()
    print(f"{'parameters':24} student {cost.student_parameters / 1e6:,.1f} M, fake score ", end="")
    print(f"{cost.trained_fake_parameters / 1e6:,.1f} M trained")
    print(f"{'memory per process, GB':24} {cost.total_bytes / 1e9:.1f}: ", end="")
    print(", ".join(f"{name} {value / 1e9:.1f}" for name, value in gigabytes.items()))
    print(f"{'updates':24} {config.iterations:,} of {batch:,} samples (processes: {processes}): ", end="")
    print(f"{config.iterations * batch / prompts:.2f} epochs of {prompts:,} prompts")


def _distill(arguments: argparse.Namespace, config: DistillConfig) -> None:
    # Imported late: importing torch and diffusers takes seconds, for which --help should not wait.
    from tiue.checkpoint import load_student
    from tiue.components import load_components
    from tiue.distill.clip import load_clip
    from tiue.distill.loop import train
    from tiue.distill.vsd import prepare
    from tiue.prompts import load_prompts, read_prompts

    samples = load_prompts(arguments.sample_prompts) if arguments.sample_prompts else None
    clip = load_clip(arguments.clip, arguments.tiny_vae) if config.clip_weight else None
    teacher = load_components(arguments.teacher)
    initial = load_student(arguments.init) if arguments.init else None
    prompts = read_prompts(arguments.prompts, arguments.prompt_field)
    run, method = prepare(teacher, prompts, arguments.out, config, initial=initial, sample_prompts=samples, clip=clip)
    print(f"student written to {train(run, method)}")


def _comma_separated(values: Sequence[object]) -> str:
    return ",".join(map(str, values))
