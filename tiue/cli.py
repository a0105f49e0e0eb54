"""The command line of the trainer: parse, load, distil."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tiue.config import CHOICES, DistillConfig, read_preset

_EXAMPLE = """\
The run's directory receives config.json, losses.csv, tensorboard/, samples/, checkpoints/ and, at the end,
student.safetensors, which `python -m export.onnx --ckpt` turns into a bundle. To resume a run that was stopped, run
the same command again. For several GPUs: accelerate launch -m tiue ..."""

_HELP = {
    "steps": "decoders N of the student, each at one DDIM timestep of the teacher",
    "shared_up_blocks": "up blocks, coarsest first, that run once, with the encoder: faster, less like the teacher",
    "iterations": "student updates",
    "batch_size": "samples per process and micro-batch",
    "accumulate": "micro-batches per update",
    "learning_rate": "of the student (Adam, constant)",
    "guidance": "classifier-free guidance of the teacher in the VSD loss",
    "fake_guidance": "of the fake score in the VSD loss; 1 draws the student towards the guided teacher",
    "kl_weight": "weight of the KL term on the predicted noise; 0 leaves it out",
    "t_min": "smallest timestep at which VSD compares the scores",
    "t_max": "largest such timestep",
    "fake_score": "lora: the teacher with adapters; full: a trainable copy of it (more memory, follows faster)",
    "fake_learning_rate": "of the fake score (Adam, constant)",
    "fake_steps": "fake score updates per student update",
    "lora_rank": "rank of the adapters",
    "lora_alpha": "scale of the adapters",
    "null_probability": "that the fake score trains a batch on the empty prompt",
    "grad_clip": "largest gradient norm, of each network",
    "ema_decay": "of the averaged student, which is what is saved",
    "mixed_precision": "autocast: bf16 is 2-3x faster than no on GPUs and on CPUs that have it",
    "seed": "the same seed, settings and machine give the same weights",
    "checkpoint_every": "iterations between checkpoints",
    "sample_every": "iterations between sample grids",
    "keep": "checkpoints kept on disk",
}


def parser() -> argparse.ArgumentParser:
    """The flags: where things are, then every field of DistillConfig."""
    result = argparse.ArgumentParser(
        prog="python -m tiue",
        description="Distil a text-to-image diffusion model into a student that draws in one pass: its encoder "
        "runs once, its decoder at N timesteps in parallel.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--teacher", required=True, metavar="DIR", help="a diffusers pipeline directory")
    result.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE", help="captions: .txt (one a line) or .jsonl"
    )
    result.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory of the run")
    result.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="begin from this student.safetensors, not from the teacher's weights",
    )
    result.add_argument(
        "--preset", type=Path, metavar="FILE", help="JSON file of the settings below, which flags override"
    )
    result.add_argument(
        "--sample-prompts",
        type=Path,
        metavar="FILE",
        help="prompts of the sample grid (default: the first 8)",
    )
    result.add_argument("--dry-run", action="store_true", help="print the settings and leave")
    settings = result.add_argument_group("settings (defaults: the paper's for SD 2.1 base, on 8 GPUs)")
    for field in dataclasses.fields(DistillConfig):
        settings.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            choices=CHOICES.get(field.name),
            metavar=None if field.name in CHOICES else "N",
            help=f"{_HELP[field.name]} (default {field.default})",
        )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0; 1 if the training diverged; 2 if it cannot run. All but 0 say why in one line."""
    arguments = parser().parse_args(argv)
    try:
        settings = read_preset(arguments.preset) if arguments.preset else {}
        for field in dataclasses.fields(DistillConfig):
            if (value := getattr(arguments, field.name)) is not None:
                settings[field.name] = value
        config = DistillConfig(**settings)
        if arguments.dry_run:
            for name, value in dataclasses.asdict(config).items():
                print(f"{name:20} {value}")
            return 0
        return _distill(arguments, config)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 2)


def _distill(arguments: argparse.Namespace, config: DistillConfig) -> int:
    from tiue.prompts import load_prompts  # torch and diffusers take seconds: not for --help or --dry-run

    prompts = load_prompts(arguments.prompts)
    samples = load_prompts(arguments.sample_prompts) if arguments.sample_prompts else None

    # At import, diffusers reports that optimum-onnx shares a namespace with optimum.
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    from tiue.checkpoint import load_student
    from tiue.components import load_components
    from tiue.distill import Distillation, DivergedError

    teacher = load_components(arguments.teacher)
    initial = load_student(arguments.init) if arguments.init else None
    run = Distillation(teacher, prompts, arguments.out, config, initial=initial, sample_prompts=samples)
    try:
        print(f"student written to {run.run()}")
    except DivergedError as error:
        return _fail(str(error), 1)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"python -m tiue: error: {' '.join(message.split())}", file=sys.stderr)
    return status
