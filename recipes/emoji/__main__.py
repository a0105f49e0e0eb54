"""`python -m recipes.emoji`: make the default model. Finished stages are not repeated, and a stopped one resumes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.emoji.presets import PRESETS

STAGES = ("data", "autoencoder", "teacher", "student", "polish", "distill", "fit", "bundle", "report")


def main(argv: list[str] | None = None) -> int:
    """Run the stages up to and including `--until`."""
    parser = argparse.ArgumentParser(prog="python -m recipes.emoji", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="size and length (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="directory of all results")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    arguments = parser.parse_args(argv)
    preset, out = PRESETS[arguments.preset], arguments.out

    from recipes.emoji import data  # Imported late: --help does not need it.

    drawings = data.prepare(out / "data", preset.resolution, preset.all_concepts)
    if arguments.until == "data":
        return 0

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
        if name == arguments.until:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
