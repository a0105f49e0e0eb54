"""`python -m recipes.emoji`: make the default model, stage by stage. A finished stage is not done again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .presets import PRESETS

STAGES = ("data", "autoencoder", "teacher", "polish", "student", "distil", "bundle", "report")


def main(argv: list[str] | None = None) -> int:
    """Run the stages up to and including `--until`."""
    parser = argparse.ArgumentParser(prog="python -m recipes.emoji", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="size and length (default cpu: 2 hours)")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="directory of all that is made")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    arguments = parser.parse_args(argv)
    preset, out = PRESETS[arguments.preset], arguments.out
    last = STAGES.index(arguments.until)

    from . import data

    drawings = data.prepare(out / "data", preset.resolution, preset.all_concepts)
    if last >= STAGES.index("autoencoder"):
        from .autoencoder import autoencoder

        vae = autoencoder(preset, drawings, out / "vae")
    if last >= STAGES.index("teacher"):
        from .teacher import teacher

        teacher(preset, drawings, vae, out / "teacher")
    if last >= STAGES.index("polish"):
        from .polish import polish

        polish(preset, drawings, out / "teacher", out / "polished")
    if last >= STAGES.index("student"):
        from .student import warm_start

        warm_start(preset, drawings, out / "polished", out / "warm.safetensors")
    if last >= STAGES.index("distil"):
        from .student import distil

        distil(preset, drawings, out / "polished", out / "warm.safetensors", out / "distil")
    if last >= STAGES.index("bundle"):
        from .student import bundle

        bundle(out / "distil/student.safetensors", out)
    if last >= STAGES.index("report"):
        from .report import report

        report(preset, drawings, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
