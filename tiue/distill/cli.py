"""The command line of the trainer: parse, load, distil."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tiue.distill.config import CHOICES, DistillConfig, preset_names, read_preset

_DESCRIPTION = """\
Distil a text-to-image diffusion model into a student that draws in one pass: its encoder runs once, its decoder at N
timesteps in parallel. Needed are a teacher (a diffusers pipeline directory) and captions; no pictures."""

_EXAMPLE = """\
files of a run:
  config.json             the settings, and by what teacher, prompts and initial student are known again
  losses.csv, tensorboard losses, gradient norms, mean and variance of the predicted noise, speed; every iteration
  samples/                grids of the sample prompts, by the averaged student
  checkpoints/            what the run goes on from
  prompts/, text/         the captions without repetitions, and their text embeddings
  student.safetensors     at the end: the averaged student, for python -m export.onnx --ckpt
  report.md               at the end: settings, losses, plots

stopping and going on:
  The same command resumes from the newest checkpoint that is whole, to the same weights as without the stop.
  SIGTERM and Ctrl-C write one first; a second Ctrl-C does not wait. Changed settings are refused, with the difference.

several GPUs, several machines, FSDP:
  accelerate config                     asks once what there is
  accelerate launch -m tiue ...         the same flags; --batch-size is per process

examples:
  python -m tiue --preset tiny --teacher DIR --prompts captions.txt --out runs/try
  accelerate launch -m tiue --preset sd21-base --teacher DIR --prompts journeydb/ --out runs/sd21
  python -m tiue --preset sd21-base ... --dry-run     settings, parameters, memory and steps, and leave"""

# Where the groups of DistillConfig's fields begin.
_GROUPS = {
    "steps": "the student",
    "iterations": "the run",
    "guidance": "the losses",
    "fake_score": "the fake score",
    "mixed_precision": "speed and memory",
    "checkpoint_every": "files",
}

_HELP = {
    "steps": "decoders N of the student, each at one DDIM timestep of the teacher; of several, as in 4,2,1, each "
    "update draws one, and one student serves all",
    "shared_up_blocks": "up blocks, coarsest first, that run once, with the encoder: faster, less like the teacher",
    "share_encoder": "the method; without, N full UNets on the same noise: a control, which cannot be exported",
    "iterations": "student updates",
    "batch_size": "samples per process and micro-batch",
    "accumulate": "micro-batches per update",
    "learning_rate": "of the student (Adam, constant)",
    "grad_clip": "largest gradient norm, of each network",
    "ema_decay": "of the averaged student, which is what is saved, for each iteration",
    "ema_every": "iterations between two averagings",
    "seed": "the same seed, settings and machine give the same weights",
    "guidance": "classifier-free guidance of the teacher in the VSD loss",
    "fake_guidance": "of the fake score in the VSD loss; 1 draws the student towards the guided teacher",
    "t_min": "smallest timestep at which VSD compares the scores",
    "t_max": "largest such timestep",
    "kl_weight": "weight of the KL term on the predicted noise; 0 leaves it out",
    "clip_weight": "weight of the CLIP loss at the beginning, falling to 0 (paper: 0.1); with --clip and --tiny-vae",
    "fake_score": "lora: the teacher with adapters; full: a trainable copy of it (more memory, follows faster)",
    "fake_learning_rate": "of the fake score (Adam, constant)",
    "fake_steps": "fake score updates per student update",
    "lora_rank": "rank of the adapters",
    "lora_alpha": "scale of the adapters",
    "null_probability": "that the fake score trains a batch on the empty prompt",
    "mixed_precision": "autocast: bf16 is 2-3x faster than no on GPUs and on CPUs that have it",
    "optimizer": "adam8bit keeps Adam's averages in 8 bits (bitsandbytes; not with FSDP)",
    "text_cache": "compute text embeddings once and keep them on the disk, so that the text encoder leaves the GPU",
    "gradient_checkpointing": "keep fewer activations and compute them again: less memory, slower",
    "ema_on_cpu": "keep the averaged student in the computer's memory",
    "channels_last": "convolutions' layout; faster on GPUs in half precision",
    "compile": "torch.compile: slow first iterations, faster ones after",
    "checkpoint_every": "iterations between checkpoints",
    "sample_every": "iterations between sample grids",
    "keep": "checkpoints kept on disk",
}
_ALIASES = {"kl_weight": ["--kl"]}


def parser() -> argparse.ArgumentParser:
    """The flags: where things are, then every field of DistillConfig."""
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
        help="where records have their caption (default: the first of prompt, caption, text, Task2.Caption)",
    )
    result.add_argument(
        "--init", type=Path, metavar="FILE", help="begin from this student.safetensors, not from the teacher's weights"
    )
    result.add_argument(
        "--preset",
        metavar="NAME",
        help=f"settings, which flags override: {', '.join(preset_names())}, or a JSON file of your own",
    )
    result.add_argument(
        "--sample-prompts", type=Path, metavar="FILE", help="prompts of the sample grid (default: the first 8)"
    )
    result.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP model of transformers, for --clip-weight")
    result.add_argument("--tiny-vae", type=Path, metavar="DIR", help="an AutoencoderTiny, for --clip-weight")
    result.add_argument("--dry-run", action="store_true", help="print what the run would be, and leave")
    group = result
    for field in dataclasses.fields(DistillConfig):
        name, default = field.name, field.default
        if name in _GROUPS:
            group = result.add_argument_group(_GROUPS[name])
        flag, text = "--" + name.replace("_", "-"), _HELP[name]
        if isinstance(default, bool):
            shown = "on" if default else "off"
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=f"{text} (default {shown})"
            )
            continue
        shown = _comma_separated(default) if isinstance(default, tuple) else default
        group.add_argument(
            flag,
            *_ALIASES.get(name, ()),
            type=_numbers if isinstance(default, tuple) else type(default),
            choices=CHOICES.get(name),
            metavar=None if name in CHOICES else "N",
            help=f"{text} (default {shown})",
        )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. All statuses but 0 say why in one line.

    Returns 0; 1 if the training diverged; 2 if it cannot run; 128 and the number of the signal that stopped it.
    """
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="python -m tiue: %(message)s")
    logging.getLogger("tiue").setLevel(logging.INFO)
    # At import, diffusers reports that optimum-onnx shares a namespace with optimum.
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    try:
        settings = read_preset(arguments.preset) if arguments.preset else {}
        for field in dataclasses.fields(DistillConfig):
            if (value := getattr(arguments, field.name)) is not None:
                settings[field.name] = value
        config = DistillConfig(**settings)
        return _dry_run(arguments, config) if arguments.dry_run else _distill(arguments, config)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 2)


def _dry_run(arguments: argparse.Namespace, config: DistillConfig) -> int:
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
    return 0


def _distill(arguments: argparse.Namespace, config: DistillConfig) -> int:
    # torch and diffusers take seconds: not for --help
    from tiue.checkpoint import load_student
    from tiue.components import load_components
    from tiue.distill.clip import load_clip
    from tiue.distill.loop import Distillation, DivergedError, StoppedError
    from tiue.prompts import load_prompts, read_prompts

    samples = load_prompts(arguments.sample_prompts) if arguments.sample_prompts else None
    clip = None
    if config.clip_weight:
        if not (arguments.clip and arguments.tiny_vae):
            raise ValueError("--clip-weight needs --clip and --tiny-vae")
        clip = load_clip(arguments.clip, arguments.tiny_vae)
    teacher = load_components(arguments.teacher)
    initial = load_student(arguments.init) if arguments.init else None
    prompts = read_prompts(arguments.prompts, arguments.prompt_field)
    run = Distillation(teacher, prompts, arguments.out, config, initial=initial, sample_prompts=samples, clip=clip)
    try:
        print(f"student written to {run.run()}")
    except DivergedError as error:
        return _fail(str(error), 1)
    except StoppedError as error:
        return _fail(str(error), 128 + error.signal)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


_numbers.__name__ = "list of whole numbers"  # how argparse calls it


def _comma_separated(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


def _fail(message: str, status: int) -> int:
    print(f"python -m tiue: error: {' '.join(message.split())}", file=sys.stderr)
    return status
