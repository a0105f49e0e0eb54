"""Draw the picture at the top of the README with the installed default model: python -m website.wall.

It shows prompts of the model's vocabulary in even steps over the whole list, one picture each, all of the same seed.
Nothing is selected.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from tiue_runtime import BundleError, Pipeline, TiueError
from tiue_runtime.bundle.replacing import replacing

COLUMNS, ROWS = 16, 6
SEED = 1
_SIDE, _MARGIN, _GAP = 64, 3, 5  # pixels of a picture, its card's margin, and between cards
_DENSE = 2  # pixels of the file for each of these
_OUT = Path(__file__).parents[1] / "docs" / "wall.webp"


def prompts(names: tuple[str, ...], count: int) -> list[str]:
    """Return prompts in even steps over a list. A list that is too short is gone through again."""
    step = max(len(names) / count, 1)
    return [names[int(index * step) % len(names)] for index in range(count)]


def wall(pictures: list[Image.Image]) -> Image.Image:
    """Return pictures as white cards with round corners on a transparent ground, row by row."""
    card = (_SIDE + 2 * _MARGIN) * _DENSE
    pitch, inset = card + _GAP * _DENSE, _MARGIN * _DENSE
    sheet = Image.new("RGBA", (COLUMNS * pitch - _GAP * _DENSE, ROWS * pitch - _GAP * _DENSE))
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left, top = index % COLUMNS * pitch, index // COLUMNS * pitch
        corner = (left, top, left + card - 1, top + card - 1)
        draw.rounded_rectangle(corner, radius=8 * _DENSE, fill="white", outline="#d8dee4", width=_DENSE // 2)
        side = _SIDE * _DENSE
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, side - 1, side - 1), radius=6 * _DENSE, fill=255)
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left + inset, top + inset), mask)
    return sheet


def main(argv: list[str] | None = None) -> int:
    """Write the picture. Return 2 if there is no such bundle, or no such place."""
    parser = argparse.ArgumentParser(prog="python -m website.wall", description="Draw the picture of the README.")
    parser.add_argument("--bundle", help="a bundle's directory or name (default: the default model)")
    parser.add_argument("--out", type=Path, default=_OUT, help="the WebP file (default: docs/wall.webp)")
    arguments = parser.parse_args(argv)
    try:
        pictures = draw(arguments.bundle)
        with replacing(arguments.out) as file:
            wall(pictures).save(file, "WEBP", quality=82, method=6)
    except (TiueError, OSError) as error:
        parser.error(str(error))
    print(f"{arguments.out.name}: {len(pictures)} pictures, {arguments.out.stat().st_size // 1024} KB")
    return 0


def draw(bundle: str | None) -> list[Image.Image]:
    """Return a picture of each prompt of the wall. Equal prompts of a short list get other seeds."""
    with Pipeline.load(bundle) as pipe:
        manifest = pipe.bundle.manifest
        known = manifest.prompts and (manifest.prompts.vocabulary or manifest.prompts.examples)
        if not known:
            raise BundleError(f"bundle {manifest.name} names no prompts that the wall could show")
        chosen = prompts(known, COLUMNS * ROWS)
        return [pipe(prompt, seed=SEED + chosen[:i].count(prompt)).images[0] for i, prompt in enumerate(chosen)]


if __name__ == "__main__":
    sys.exit(main())
