"""`python -m export.onnx --ckpt student.safetensors`: a bundle for tiue-runtime, checked against PyTorch."""

import argparse
import logging
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

_SETTING = re.compile(r"`(base|steps|shared_up_blocks)`")  # as libraries name what is a flag here
_STEPS_HELP = "step counts, e.g. 4 or 4,2,1 (default: all the student was trained for; of a pipeline, 4)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0; 1 if the graphs do not compute what PyTorch does; 2 if it cannot run."""
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _export(arguments)


def _export(arguments: argparse.Namespace) -> int:
    # At import, diffusers reports that optimum-onnx shares a namespace with optimum.
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    # Imported late: these bring torch, which takes seconds that --help and a mistyped flag need not wait for.
    from export.assemble import Options, check_target, export_bundle
    from export.errors import ParityError
    from export.parity import table
    from export.source import load_source
    from tiue.components import load_tiny_vae

    source = arguments.ckpt  # not yet a Path, which would make the Hub id owner/name of ./owner/name
    out = Path(arguments.out or f"{Path(source).resolve().name.removesuffix('.safetensors')}-bundle")
    try:
        options = Options(
            name=arguments.name,
            targets=arguments.target,
            precision=arguments.precision,
            weights=arguments.weights,
            text_encoder=arguments.text_encoder,
            tiny_vae=load_tiny_vae(arguments.vae_path) if arguments.vae_path else None,
            vaes=arguments.vae,
            overwrite=arguments.overwrite,
            **_calibration(arguments.calibration_prompts),
        )
        check_target(out, arguments.overwrite)
        _progress(f"loading {source}")
        student = load_source(source, arguments.steps, arguments.base, arguments.shared_up_blocks)
        if not student.declared:
            _show_warning(
                f"{source} does not say what it was trained for, and is taken for a TiUE student of "
                f"{max(student.schedules)} steps; a UNet that was not distilled so makes poor pictures"
            )
        if student.components.license == "unknown":
            _show_warning(
                f"the license of {source} is unknown: declare it in its README.md before you share the bundle"
            )
        export_bundle(student, out, options, _progress, lambda rows: print(table(rows, options.precision)))
    except ParityError as error:
        return _fail(str(error), 1)
    except (ValueError, OSError) as error:
        return _fail(_SETTING.sub(lambda name: f"--{name[1].replace('_', '-')}", str(error)), 2)
    except MemoryError as error:
        return _fail(f"out of memory {error}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 2)
    print(f"wrote {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.onnx",
        description="Export a student to an ONNX bundle for tiue-runtime. The bundle appears only if its "
        "graphs compute what PyTorch computes, at other batch sizes and resolutions than those traced.",
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        help="student.safetensors; a diffusers pipeline directory (Loopfree's layout); the Hugging Face Hub id "
        "owner/name of one, to download it; or, with --base, a safetensors file of UNet weights",
    )
    parser.add_argument(
        "--base", metavar="DIR", help="of UNet weights: the pipeline directory (or Hub id) that has all the rest"
    )
    parser.add_argument("--out", help="the bundle directory to make (default: <name of --ckpt>-bundle, here)")
    parser.add_argument("--overwrite", action="store_true", help="replace the bundle at --out")
    parser.add_argument("--name", help="the model's name (default: the one in --ckpt)")
    parser.add_argument("--steps", type=_steps, help=_STEPS_HELP)
    parser.add_argument(
        "--shared-up-blocks",
        type=int,
        metavar="K",
        help="of a pipeline: the up blocks that it was trained to run once (default: 0; a student says it itself)",
    )
    parser.add_argument(
        "--target",
        type=_list_of("portable", "cpu", "cuda"),
        default=(),
        metavar="TARGET[,TARGET]",
        help="portable runs anywhere; cpu and cuda have operators of ONNX Runtime for its CPU and CUDA providers, and "
        "share the weights' file (default: portable, and cpu for a model over 1 GB)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="what graphs compute in; fp16 is for GPUs, and keeps in fp32 what overflows; int8 is for CPUs, and keeps "
        "in fp32 what loses most (default: fp32)",
    )
    parser.add_argument(
        "--calibration-prompts",
        metavar="FILE",
        help="for --precision int8: prompts, one a line, that the ranges of activations are measured on (default: 16 "
        "of all kinds)",
    )
    parser.add_argument(
        "--weights",
        choices=("fp32", "fp16"),
        help="storage: fp16 halves the files, also of what computes in fp32 (default: as --precision)",
    )
    parser.add_argument(
        "--vae",
        type=_list_of("kl", "tiny"),
        default=(),
        metavar="KIND[,KIND]",
        help="image decoders: tiny takes kl's place; of two the first is the default (default: the model's own)",
    )
    parser.add_argument(
        "--vae-path", metavar="DIR", help="for --vae tiny: a diffusers AutoencoderTiny (TAESD's layout)"
    )
    parser.add_argument(
        "--text-encoder", choices=("fp32", "int8"), default="fp32", help="int8 quarters the text encoder"
    )
    return parser


def _calibration(path: str | None) -> dict[str, tuple[str, ...]]:
    from tiue.prompts import load_prompts

    return {"calibration_prompts": tuple(load_prompts(Path(path)))} if path else {}


def _list_of(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        items = tuple(text.split(","))
        if not set(items) <= set(allowed) or len(set(items)) < len(items):
            raise argparse.ArgumentTypeError(f"expected one or several of {', '.join(allowed)} by commas, got {text!r}")
        return items

    return parse


def _steps(text: str) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        steps = []
    if not steps or min(steps) < 1:
        raise argparse.ArgumentTypeError(f"expected step counts such as 4 or 4,2,1, got {text!r}")
    return steps


def _progress(message: str) -> None:
    print(f"{message} ...", file=sys.stderr, flush=True)


def _show_warning(message: object, *_: object, **__: object) -> None:
    print(f"export.onnx: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, status: int) -> int:
    print(f"export.onnx: error: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being told to stop cleans up, too
    sys.exit(main())
