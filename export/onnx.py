"""`python -m export.onnx --ckpt student.safetensors`: a bundle for tiue-runtime, checked against PyTorch."""

import argparse
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# With this folder on sys.path, the `import onnx` of libraries would find this file.
if Path(__file__).resolve().parent in (Path(entry).resolve() for entry in sys.path):
    print("export.onnx: error: started inside export/; from the folder above: python -m export.onnx", file=sys.stderr)
    sys.exit(2)

from tiue_runtime.bundle import MANIFEST

from export.options import Options
from tiue.settings import add_flags, check, given, setting, with_flags


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
    from export.assemble import export_bundle
    from export.errors import ParityError
    from export.parity import table
    from export.publish import check_target
    from export.source import load_source
    from tiue.components import load_tiny_vae
    from tiue.prompts import load_prompts

    source = arguments.ckpt  # not yet a Path, which would make the Hub id owner/name of ./owner/name
    try:
        chosen = Source(**given(arguments, Source))
        out = Path(chosen.out or f"{Path(source).resolve().name.removesuffix('.safetensors')}-bundle")
        prompts = load_prompts(Path(chosen.calibration_prompts)) if chosen.calibration_prompts else ()
        options = Options(
            **given(arguments, Options),
            tiny_vae=load_tiny_vae(chosen.vae_path) if chosen.vae_path else None,
            calibration_prompts=tuple(prompts),
        )
        check_target(out, MANIFEST, overwrite=options.overwrite)
        _progress(f"loading {source}")
        student = load_source(source, chosen.steps, chosen.base, chosen.shared_up_blocks)
        if not student.declared:
            _show_warning(
                f"{source} does not say what it was trained for, and is taken for a TiUE student of "
                f"{max(student.schedules)} steps; a UNet that was not distilled so makes poor pictures"
            )
        if student.components.license == "unknown":
            _show_warning(f"the license of {source} is unknown: find it out before you share the bundle")
        export_bundle(student, out, options, _progress, lambda rows: print(table(rows, options.precision)))
    except ParityError as error:
        return _fail(str(error), 1)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except MemoryError as error:
        return _fail(f"out of memory {error}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 2)
    print(f"wrote {out}")
    return 0


@dataclass(frozen=True)
class Source:
    """What to export, and where to."""

    base: str | None = setting(
        None, "of UNet weights: the pipeline directory (or Hub id) that has all the rest", metavar="DIR", shown="none"
    )
    out: str | None = setting(
        None, "the bundle directory to make", metavar="DIR", shown="the checkpoint's name with -bundle, here"
    )
    steps: tuple[int, ...] | None = setting(
        None, "step counts, such as 4,2,1", at_least=1, shown="all the student was trained for; of a pipeline, 4"
    )
    shared_up_blocks: int | None = setting(
        None,
        "of a pipeline: the up blocks that it was trained to run once",
        at_least=0,
        metavar="K",
        shown="0; a student says it itself",
    )
    vae_path: str | None = setting(
        None, "for the vae tiny: a diffusers AutoencoderTiny (TAESD's layout)", metavar="DIR", shown="none"
    )
    calibration_prompts: str | None = setting(
        None,
        "for the precision int8: prompts, one a line, on which the ranges of activations are measured",
        metavar="FILE",
        shown="16 of all kinds",
    )

    def __post_init__(self) -> None:
        check(self)


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
    add_flags(parser, Source)
    add_flags(parser, Options)
    return parser


def _progress(message: str) -> None:
    print(f"{message} ...", file=sys.stderr, flush=True)


def _show_warning(message: object, *_: object, **__: object) -> None:
    print(f"export.onnx: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, status: int) -> int:
    for settings in (Source, Options):
        message = with_flags(message, settings)
    print(f"export.onnx: error: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being told to stop cleans up, too
    sys.exit(main())
