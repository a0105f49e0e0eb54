"""`python -m recipes.quality`: compare the methods. Finished parts are not repeated, and a stopped one resumes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recipes.quality.rows import PRESETS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, or some of its rows.

    Returns:
        0; 2 for arguments that make no sense.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.quality", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes and budgets (default: cpu)")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path("runs/emoji"),
        metavar="DIR",
        help="what python -m recipes.emoji made: data, polished, warm.safetensors (default: runs/emoji)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quality"), metavar="DIR", help="directory of all results"
    )
    parser.add_argument("--rows", metavar="NAME[;NAME]", help="only these rows (default: all)")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="training seeds of the main rows (default: the preset's)"
    )
    arguments = parser.parse_args(argv)
    preset = PRESETS[arguments.preset]
    names = arguments.rows.split(";") if arguments.rows else None
    known = [row.name for row in preset.rows]
    if unknown := [name for name in names or () if name not in known]:
        print(
            f"python -m recipes.quality: --rows: expected names of {'; '.join(known)}, got {unknown[0]}",
            file=sys.stderr,
        )
        return 2
    if arguments.seeds is not None:
        if arguments.seeds < 1:
            print(f"python -m recipes.quality: --seeds: expected 1 or more, got {arguments.seeds}", file=sys.stderr)
            return 2
        preset = replace(preset, seeds=arguments.seeds)

    from recipes.emoji import data  # Imported late: --help does not need it.
    from recipes.quality.contest import Contest
    from recipes.quality.material import Material
    from recipes.quality.page import collect, write_page

    if not (arguments.source / "data/captions.json").exists():
        print(f"python -m recipes.quality: --source: {arguments.source} has no data/captions.json", file=sys.stderr)
        return 2
    contest = Contest(Material(preset, arguments.source, data.load(arguments.source / "data"), arguments.out))
    for row in preset.rows:
        if names is None or row.name in names:
            contest.run(row)
    write_page(contest, collect(contest, preset.rows))
    print(f"table, plots and sheet written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
