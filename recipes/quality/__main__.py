"""`python -m recipes.quality`: compare the methods. Finished parts are not repeated, and a stopped one resumes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from recipes.quality.rows import PRESETS, Preset

_SOURCE = ("data/captions.json", "data/drawings.npz", "polished", "warm.safetensors")
_EPILOG = "One judge is an Inception network, which is fetched once with npm (nsfwjs 4.4.0). Smoke has none."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, or some of its rows; on failure, print one line that says why.

    Returns:
        0; 1 if a run diverged; 2 if it cannot run; 128 plus the number of the signal that stopped it.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.quality", description=__doc__, epilog=_EPILOG)
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

    from tiue.distill.command import status_of  # Imported late: --help does not need it.

    return status_of(parser.prog, lambda: _compare(preset, names or known, arguments.source, arguments.out))


def _compare(preset: Preset, names: Collection[str], source: Path, out: Path) -> None:
    from recipes.directory import claim, content_hash
    from recipes.emoji import data
    from recipes.quality.contest import Contest
    from recipes.quality.material import Material
    from recipes.quality.page import collect, write_page

    if missing := [name for name in _SOURCE if not (source / name).exists()]:
        raise ValueError(f"--source: {source} has no {missing[0]}")
    settings = {name: value for name, value in asdict(preset).items() if name not in ("rows", "seeds")}
    claim(out, settings | {"source": {name: content_hash(source / name) for name in _SOURCE}})
    contest = Contest(Material(preset, source, data.load(source / "data"), out))
    for row in preset.rows:
        if row.name in names:
            contest.run(row)
    write_page(contest, collect(contest, preset.rows))
    print(f"table, plots and sheet written to {out}")


if __name__ == "__main__":
    sys.exit(main())
