"""`python -m recipes.emoji`: make the default model. Finished stages are not repeated, and a stopped one resumes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from recipes.emoji.presets import PRESETS, Preset

STAGES = ("data", "autoencoder", "teacher", "student", "polish", "distill", "fit", "bundle", "report")


def main(argv: list[str] | None = None) -> int:
    """Run the stages up to and including `--until`; on failure, print one line that says why.

    Returns:
        0; 1 if a stage diverged; 2 if it cannot run; 128 plus the number of the signal that stopped it.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.emoji", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="size and length (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="directory of all results")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    arguments = parser.parse_args(argv)

    from tiue.distill.command import status_of  # Imported late: --help does not need it.

    return status_of(parser.prog, lambda: _make(PRESETS[arguments.preset], arguments.out, arguments.until))


def _make(preset: Preset, out: Path, until: str) -> None:
    from recipes.directory import claim
    from recipes.emoji import data

    claim(out, asdict(preset))
    drawings = data.prepare(out / "data", preset.resolution, preset.all_concepts)
    if until == "data":
        return

    from recipes.emoji.autoencoder import autoencoder
    from recipes.emoji.best import Best
    from recipes.emoji.polish import fit, polish
    from recipes.emoji.report import report
    from recipes.emoji.student import bundle, distill, warm_start
    from recipes.emoji.teacher import teacher

    best = Best(preset, drawings, out)
    vae = autoencoder(preset, drawings, out / "vae")
    rest = {
        "autoencoder": lambda: None,
        "teacher": lambda: teacher(preset, drawings, vae, out / "teacher", best.of_teacher),
        "student": lambda: warm_start(preset, drawings, out / "teacher", out / "warm.safetensors"),
        "polish": lambda: polish(preset, drawings, out / "teacher", out / "polished"),
        "distill": lambda: distill(
            preset, drawings, out / "polished", out / "warm.safetensors", out / "distill", best.of_student
        ),
        "fit": lambda: fit(
            preset,
            drawings,
            out / "polished",
            out / "pairs.pt",
            out / "distill/student.safetensors",
            out / "fitted.safetensors",
        ),
        "bundle": lambda: bundle(drawings, out / "fitted.safetensors", out),
        "report": lambda: report(preset, drawings, out),
    }
    for name, run in rest.items():
        run()
        if name == until:
            break


if __name__ == "__main__":
    sys.exit(main())
