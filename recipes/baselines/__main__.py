"""`python -m recipes.baselines METHOD`: distill a model by another method, for comparison."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.baselines.config import PRESETS, SWIFTBRUSH, SWIFTBRUSH_V2, AddConfig, LcmConfig, SwiftBrushV2Config
from tiue.distill.command import status_of
from tiue.distill.config import DistillConfig, RunConfig, preset_names, read_preset
from tiue.settings import add_flags, given

_EPILOG = """\
examples:
  python -m recipes.baselines lcm --preset lcm-sd15 --teacher DIR --pictures FOLDER --out runs/lcm
  python -m recipes.baselines swiftbrush --preset swiftbrush-sd21 --teacher DIR --prompts captions.txt --out runs/sb
  python -m recipes.baselines lcm --preset lcm-sd15 --teacher DIR --dry-run     print settings and memory, and stop
  python -m recipes.baselines merge --full A/student.safetensors --lora B/student.safetensors --out merged.safetensors

The same command resumes a stopped run. docs/quality.md compares the methods.
"""


@dataclass(frozen=True)
class _Command:
    """A method on the command line."""

    help: str
    config: type[RunConfig]
    needs: tuple[str, ...]  # flags, besides --teacher and --out
    defaults: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "lcm": _Command("latent consistency distillation", LcmConfig, ("pictures",)),
    "add": _Command("adversarial diffusion distillation, as in SD-Turbo", AddConfig, ("pictures", "observer")),
    "swiftbrush": _Command("one-step VSD", DistillConfig, ("prompts",), SWIFTBRUSH),
    "swiftbrushv2": _Command(
        "one-step VSD from an adversarial student, with CLIP",
        SwiftBrushV2Config,
        ("prompts", "init", "clip"),
        SWIFTBRUSH_V2,
    ),
}
_FILES = {
    "pictures": ("DIR", "a folder of pictures with metadata.jsonl: file_name, text"),
    "prompts": ("PATH", "captions: .txt (one a line), .jsonl, .parquet, or a directory of such files"),
    "observer": ("PATH", "what the critic sees through: a DINOv2 directory or an encoder.safetensors"),
    "clip": ("PATH", "what aligns pictures with captions: a CLIP directory or an encoder.safetensors"),
    "init": ("PATH", "start from this student.safetensors or pipeline directory, not from the teacher"),
    "tiny-vae": ("DIR", "an AutoencoderTiny, for a CLIP directory"),
    "sample-prompts": ("FILE", "prompts of the sample grid (default: eight of the captions)"),
    "out": ("DIR", "directory of the run"),
}


def parser() -> argparse.ArgumentParser:
    """Make the parser: a command for each method with all of its settings, and `merge`."""
    result = argparse.ArgumentParser(
        prog="python -m recipes.baselines",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(dest="method", required=True, metavar="METHOD")
    presets = f"settings: {', '.join(preset_names(PRESETS))}, or a JSON file"
    for name, command in METHODS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        sub.add_argument("--teacher", required=True, metavar="DIR", help="a diffusers pipeline directory")
        optional = ("init", "sample-prompts", "out", *(["tiny-vae"] if "clip" in command.needs else []))
        for flag in dict.fromkeys((*command.needs, *optional)):
            metavar, text = _FILES[flag]
            sub.add_argument(f"--{flag}", type=Path, metavar=metavar, help=text)
        sub.add_argument("--preset", metavar="NAME", help=presets)
        sub.add_argument("--dry-run", action="store_true", help="print settings and memory, and stop")
        add_flags(sub, command.config)
    merge = commands.add_parser("merge", help="merge two students of SwiftBrush v2", description="Merge two students.")
    for name in ("full", "lora"):
        merge.add_argument(f"--{name}", required=True, type=Path, metavar="FILE", help="a student.safetensors")
    merge.add_argument("--share", type=float, default=0.5, help="share of --lora in the weights (default 0.5)")
    merge.add_argument("--out", required=True, type=Path, metavar="FILE", help="the merged student.safetensors")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. On failure, print the reason as one line on stderr.

    Returns:
        0; 1 if the training diverged; 2 if it cannot run; 128 plus the number of the signal that stopped it.
    """
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="python -m recipes.baselines: %(message)s")
    logging.getLogger("tiue").setLevel(logging.INFO)
    command = METHODS.get(arguments.method)
    settings = command.config if command else None
    return status_of("python -m recipes.baselines", lambda: _run(arguments, command), settings)


def _run(arguments: argparse.Namespace, command: _Command | None) -> None:
    if command is None:
        _merge(arguments)
        return
    preset = read_preset(arguments.preset, command.config, PRESETS) if arguments.preset else {}
    config = command.config(**command.defaults | preset | given(arguments, command.config))
    if arguments.dry_run:
        _dry_run(arguments, config)
    else:
        _distill(arguments, config)


def _distill(arguments: argparse.Namespace, config: Any) -> None:
    from recipes.baselines.few_steps import load_unet
    from tiue.components import load_components
    from tiue.distill.loop import train
    from tiue.prompts import load_prompts

    for flag in (*METHODS[arguments.method].needs, "out"):
        if getattr(arguments, flag) is None:
            raise ValueError(f"{arguments.method} needs --{flag}")
    teacher = load_components(arguments.teacher)
    samples = load_prompts(arguments.sample_prompts) if arguments.sample_prompts else None
    initial = load_unet(arguments.init, teacher) if arguments.init else None
    run, method = _PREPARE[arguments.method](arguments, teacher, config, initial, samples)
    print(f"result written to {train(run, method)}")


def _prepare_lcm(arguments: argparse.Namespace, teacher: Any, config: Any, initial: Any, samples: Any) -> Any:
    from recipes.baselines import lcm

    data = _pictures(arguments, teacher)
    return lcm.prepare(teacher, data, arguments.out, config, initial=initial, sample_prompts=samples or data.first(8))


def _prepare_add(arguments: argparse.Namespace, teacher: Any, config: Any, initial: Any, samples: Any) -> Any:
    from accelerate import PartialState

    from recipes.baselines import add
    from recipes.baselines.observers import load_observer

    data, observer = _pictures(arguments, teacher), load_observer(arguments.observer, PartialState().device)
    samples = samples or data.first(8)
    return add.prepare(teacher, data, arguments.out, config, observer, initial=initial, sample_prompts=samples)


def _prepare_swiftbrush(arguments: argparse.Namespace, teacher: Any, config: Any, initial: Any, samples: Any) -> Any:
    from recipes.baselines import swiftbrush
    from tiue.prompts import read_prompts

    prompts = read_prompts(arguments.prompts)
    return swiftbrush.prepare(teacher, prompts, arguments.out, config, initial=initial, sample_prompts=samples)


def _prepare_v2(arguments: argparse.Namespace, teacher: Any, config: Any, initial: Any, samples: Any) -> Any:
    from recipes.baselines import swiftbrushv2
    from recipes.baselines.observers import EncoderAlignment
    from tiue.distill.clip import load_clip
    from tiue.prompts import read_prompts

    if arguments.clip.is_dir():
        if arguments.tiny_vae is None:
            raise ValueError("a CLIP directory needs --tiny-vae")
        alignment: Any = load_clip(arguments.clip, arguments.tiny_vae, config.clip_margin)
    elif arguments.tiny_vae is not None:
        raise ValueError(f"--tiny-vae is for a CLIP directory, and {arguments.clip} is none")
    else:
        alignment = EncoderAlignment(arguments.clip, teacher, config.clip_margin)
    prompts = read_prompts(arguments.prompts)
    return swiftbrushv2.prepare(
        teacher, prompts, arguments.out, config, initial=initial, alignment=alignment, sample_prompts=samples
    )


_PREPARE: dict[str, Callable[..., Any]] = {
    "lcm": _prepare_lcm,
    "add": _prepare_add,
    "swiftbrush": _prepare_swiftbrush,
    "swiftbrushv2": _prepare_v2,
}


def _pictures(arguments: argparse.Namespace, teacher: Any) -> Any:
    from recipes.baselines.pictures import CaptionedPictures

    return CaptionedPictures(arguments.pictures, teacher.geometry.height * teacher.geometry.pixels_per_latent)


def _merge(arguments: argparse.Namespace) -> None:
    from recipes.baselines.swiftbrushv2 import merge
    from tiue.checkpoint import load_student, save_student

    if not 0 <= arguments.share <= 1:
        raise ValueError(f"--share must be a number from 0 to 1, got {arguments.share}")
    merged = merge(load_student(arguments.full), load_student(arguments.lora), arguments.share)
    save_student(arguments.out, merged)
    print(f"student written to {arguments.out}")


def _dry_run(arguments: argparse.Namespace, config: RunConfig) -> None:
    from recipes.baselines.memory import memory

    for name, value in dataclasses.asdict(config).items():
        print(f"{name:24} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    parts = memory(arguments.method, arguments.teacher, config)
    print(f"\n{'memory of the GPU, GB':24} {sum(parts.values()) / 1e9:.1f}: ", end="")
    print(", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts.items()))


if __name__ == "__main__":
    sys.exit(main())
