"""The command `python -m export.onnx --ckpt student.safetensors`: make a bundle and check it against PyTorch."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# With this folder on sys.path, the `import onnx` of libraries would find this file.
if Path(__file__).resolve().parent in (Path(entry).resolve() for entry in sys.path):
    print("export.onnx: error: started inside export/; from the folder above: python -m export.onnx", file=sys.stderr)
    sys.exit(2)

from tiue_runtime.bundle import MANIFEST

from export.export_options import Options
from tiue.files import one_line
from tiue.settings import add_flags, check, given, setting, with_flags

if TYPE_CHECKING:
    from tiue.checkpoint import Student
    from tiue.one_step import SchedulerChoice


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if the graphs do not compute what PyTorch computes; 2 if the export cannot be done.
    """
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _report_errors(arguments)


def _report_errors(arguments: argparse.Namespace) -> int:
    from export.errors import ParityError

    try:
        out = _export(arguments)
    except ParityError as error:
        return _fail(error, 1)
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except MemoryError as error:
        return _fail(f"out of memory: {error}".removesuffix(": "), 2)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # PyTorch raises a plain RuntimeError on the CPU.
            raise
        return _fail("out of memory", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 2)
    print(f"wrote {out}")
    return 0


def _export(arguments: argparse.Namespace) -> Path:
    """Export as the flags say. Returns the directory of the bundle."""
    # At import, diffusers reports that optimum-onnx shares a namespace with optimum.
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    # These import torch, which takes seconds. --help and errors in flags stay fast.
    from export.assemble import export_bundle
    from export.lora import parse_lora
    from export.parity import table
    from export.publish import check_target
    from export.source import load_source
    from export.upscaler import load_upscaler
    from tiue.components import load_tiny_vae
    from tiue.prompts import load_prompts

    source = arguments.ckpt  # A Path drops ./, and owner/name would then look like an id of the Hub.
    chosen = Source(**given(arguments, Source))
    if chosen.safety_checker_path is not None and arguments.safety_checker is False:
        raise ValueError("`safety_checker` off leaves out the one in `safety_checker_path`; leave one of the flags out")
    out = Path(chosen.out or f"{Path(source).resolve().name.removesuffix('.safetensors')}-bundle")
    loras = [parse_lora(text) for text in chosen.lora]
    prompts = load_prompts(Path(chosen.calibration_prompts)) if chosen.calibration_prompts else ()
    options = Options(
        **given(arguments, Options),
        upscaler=load_upscaler(Path(chosen.upscaler)) if chosen.upscaler else None,
        tiny_vae=load_tiny_vae(chosen.vae_path) if chosen.vae_path else None,
        calibration_prompts=tuple(prompts),
    )
    check_target(out, MANIFEST, overwrite=options.overwrite)
    _progress(f"loading {source}")
    checker = options.safety_checker and (chosen.safety_checker_path or True)
    student = load_source(
        source,
        chosen.steps,
        chosen.base,
        chosen.shared_up_blocks,
        loras,
        chosen.scheduler_choice(),
        safety_checker=checker,
    )
    if not student.declared:
        _show_warning(_what_for(source, student))
    if student.components.license == "unknown":
        _show_warning(f"the license of {source} is unknown: find it out before you share the bundle")
    if loras:
        _show_warning("the license in the bundle is the model's: see whether those of the LoRAs allow what you plan")
    export_bundle(student, out, options, _progress, lambda rows: print(table(rows, options.precision)))
    return out


def _what_for(source: str, student: Student) -> str:
    steps = f"TiUE student of {max(student.schedules)} steps"
    if student.one_step is not None:
        steps = f"one-step student: {student.one_step.scheduler}, timestep {student.encoder_timestep}"
    return (
        f"{source} does not say what it was trained for. It is exported as a {steps}; a UNet that was not distilled as "
        "one makes poor pictures"
    )


@dataclass(frozen=True)
class Source:
    """What to export, and where to."""

    base: str | None = setting(
        None,
        "with UNet weights: the pipeline directory, or Hub id, that has the rest of the model",
        group="what to export, and where to",
        metavar="DIR",
        shown="none",
    )
    out: str | None = setting(
        None, "the bundle directory to make", metavar="DIR", shown="the checkpoint's name with -bundle, here"
    )
    steps: tuple[int, ...] | None = setting(
        None, "step counts, such as 4,2,1", at_least=1, shown="all that the student was trained for; for a pipeline, 4"
    )
    shared_up_blocks: int | None = setting(
        None,
        "for a pipeline: the number of up blocks that belong to the encoder, which runs once",
        at_least=0,
        metavar="K",
        shown="0; a student has its own",
    )
    lora: tuple[str, ...] = setting(
        (),
        "a LoRA to merge into the model (safetensors), and its strength, 1 by default; may be given several times",
        repeated=True,
        metavar="FILE[:SCALE]",
        shown="none",
    )
    scheduler: str | None = setting(
        None,
        "for a one-step student of another method: the class of its scheduler, such as LCMScheduler, with the "
        "pipeline's configuration",
        shown="the pipeline's",
    )
    timesteps: int | None = setting(
        None,
        "for a one-step student of another method: its timestep, such as 999",
        at_least=0,
        metavar="T",
        shown="the scheduler's",
    )
    guidance: float | None = setting(
        None,
        "for a latent consistency model whose UNet takes the guidance scale as an input: that scale, such as 8.5",
        shown="none",
    )
    upscaler: str | None = setting(
        None,
        "the weights of an upscaler (safetensors, of an architecture that spandrel knows), which applications may use",
        metavar="FILE",
        shown="none",
    )
    vae_path: str | None = setting(
        None, "for the vae tiny: a diffusers AutoencoderTiny (TAESD's layout)", metavar="DIR", shown="none"
    )
    safety_checker_path: str | None = setting(
        None,
        "take the safety checker from this pipeline directory, or Hub id; a student.safetensors has none",
        metavar="DIR",
        shown="the model's own",
    )
    calibration_prompts: str | None = setting(
        None,
        "for the precision int8: prompts, one a line, to measure the ranges of activations with",
        metavar="FILE",
        shown="16 built-in prompts",
    )

    def __post_init__(self) -> None:
        check(self)

    def scheduler_choice(self) -> SchedulerChoice | None:
        """Return how a one-step student makes its step. None if no flag says so."""
        from tiue.one_step import SchedulerChoice  # imports torch

        choice = SchedulerChoice(self.scheduler, self.timesteps, self.guidance)
        return None if choice == SchedulerChoice() else choice


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.onnx",
        description="Export a student to an ONNX bundle for tiue-runtime. The bundle appears only if its graphs "
        "match PyTorch, also at batch sizes and resolutions that were not traced.",
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        help="student.safetensors; a diffusers pipeline directory, for example an official Loopfree checkpoint; the "
        "Hugging Face Hub id owner/name of one, to download it; or, with --base, a safetensors file of UNet weights",
    )
    add_flags(parser, Source)
    add_flags(parser, Options)
    return parser


def _progress(message: str) -> None:
    print(f"{message} ...", file=sys.stderr, flush=True)


def _show_warning(message: object, *_: object, **__: object) -> None:
    print(f"export.onnx: warning: {_with_flags(str(message))}", file=sys.stderr)


def _fail(error: BaseException | str, status: int) -> int:
    print(f"export.onnx: error: {_with_flags(error)}", file=sys.stderr)
    return status


def _with_flags(message: BaseException | str) -> str:
    text = one_line(message)
    for settings in (Source, Options):
        text = with_flags(text, settings)
    return text


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # A stopped export removes its files, too.
    sys.exit(main())
