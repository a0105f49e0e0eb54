"""A data set of the recipe without pictures of anything."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.emoji import data


def random_drawings() -> data.Drawings:
    """Random pictures of 30 concepts: enough for statistics of 16 features, without a network.

    Only the first concept has several captions: a recipe encodes them all.
    """
    random = np.random.default_rng(0)
    concepts = np.repeat(np.arange(30), len(data.STYLES))
    styles = np.tile(np.arange(len(data.STYLES)), 30)
    names = list(data.STYLES)
    held_out = np.array([data.is_held_out(f"{c:X}", names[s]) for c, s in zip(concepts, styles, strict=True)])
    images = random.integers(0, 256, (len(concepts), 64, 64, 3), np.uint8)
    captions = [["thing 0", "a thing 0"], *([f"thing {i}"] for i in range(1, 30))]
    return data.Drawings(images, concepts, styles, held_out, captions)


def prepared(drawings: data.Drawings, directory: Path):
    """As the stage of the data leaves them."""
    directory.mkdir()
    np.savez(
        directory / "drawings.npz",
        images=drawings.images,
        concept=drawings.concept,
        style=drawings.style,
        held_out=drawings.held_out,
    )
    (directory / "captions.json").write_text(json.dumps(drawings.captions))


def save_pictures(directory: Path) -> Path:
    """Write a folder of five pictures with captions."""
    random = np.random.default_rng(0)
    lines = []
    for i in range(5):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(directory / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": [f"thing {i}", f"a thing {i}"] if i else "a cat"}))
    (directory / "metadata.jsonl").write_text("\n".join(lines))
    return directory
