"""Drawings and captions: fetch the pinned npm packages, render every SVG, write captions, hold out a tenth."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

from evaluation.reference import read_arrays, read_captions
from recipes.directory import whole_directory
from tiue.files import one_line, write_text, written_whole

# Style word in captions => (npm package, license). The order is the style index.
STYLES = {
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "noto classic": ("@iconify-json/noto-v1@1.2.5", "Apache-2.0"),
    "fluent": ("@iconify-json/fluent-emoji@1.2.7", "MIT"),
    "fluent flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
    "emojione": ("@iconify-json/emojione@1.2.3", "CC-BY-4.0"),
}
LABELS = "emojibase-data@17.0.0"
CONCEPTS = Path(__file__).with_name("concepts.txt")
NAMES = Path(__file__).with_name("names.txt")


@dataclass(frozen=True)
class Drawings:
    """The data set. Row i of every array is a drawing of a concept in a style."""

    images: np.ndarray  # uint8 (n, H, W, 3), on white
    concept: np.ndarray  # int64 (n,), index into `captions`
    style: np.ndarray  # int64 (n,), index into STYLES
    held_out: np.ndarray  # bool (n,), never used for training by any stage
    captions: list[list[str]]  # per concept, without a style word; the first is the label

    def caption(self, row: int, variant: int, with_style: bool) -> str:
        """Return caption number `variant` of drawing `row`, with its style word if `with_style`."""
        text = self.captions[self.concept[row]][variant]
        return in_style(text, self.style[row]) if with_style else text


def in_style(text: str, style: int) -> str:
    """Return a caption with the style word of style number `style`."""
    return f"{text}, {list(STYLES)[style]} style"


def prepare(directory: Path, resolution: int, all_concepts: bool) -> Drawings:
    """Make the data set in `directory` (once), and load it.

    Raises:
        ValueError: the directory has drawings of another size, or damaged files.
        OSError: a package could not be fetched.
    """
    archive, captions = directory / "drawings.npz", directory / "captions.json"
    if not captions.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _render_all(directory, archive, captions, resolution, all_concepts)
    drawings = load(directory)
    if (size := drawings.images.shape[1:3]) != (resolution, resolution):
        raise ValueError(
            f"{archive}: expected drawings of {resolution} x {resolution} pixels, got {size[0]} x {size[1]}"
        )
    return drawings


def load(directory: Path) -> Drawings:
    """Load a data set that `prepare` made.

    Raises:
        ValueError: a file is damaged, or both are not of one data set.
    """
    archive, names = directory / "drawings.npz", ("images", "concept", "style", "held_out")
    arrays, captions = read_arrays(archive, names), read_captions(directory / "captions.json")
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"{archive}: expected {', '.join(names)}, found no {missing[0]}")
    if len({len(values) for values in arrays.values()}) > 1 or arrays["concept"].max(initial=-1) >= len(captions):
        raise ValueError(f"{archive}: expected drawings of the {len(captions)} concepts of captions.json, found others")
    return Drawings(**arrays, captions=captions)


def is_held_out(hexcode: str, style: str) -> bool:
    """Select a tenth of the (concept, style) pairs. A hash decides, so that the choice stays when the set grows."""
    return hashlib.sha256(f"{hexcode}/{style}".encode()).digest()[0] * 10 < 256


def fetch(package: str, directory: Path) -> Path:
    """Download and unpack an npm package of an exact version, once. npm checks its integrity.

    Returns:
        Its directory.

    Raises:
        OSError: npm is missing, or could not fetch the package whole.
    """
    target = directory / re.sub(r"[^\w.]+", "-", package).strip("-")
    if not (target / "package").is_dir():
        command = ["npm", "pack", package, "--silent", "--pack-destination", str(directory)]
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise OSError(f"npm is not installed, and only it can fetch {package}") from error
        except subprocess.CalledProcessError as error:
            raise OSError(f"npm could not fetch {package}: {one_line(error.stderr or error)}") from error
        try:
            with whole_directory(target) as unfinished, tarfile.open(directory / done.stdout.split()[-1]) as tar:
                tar.extractall(unfinished, filter="data")
        except (tarfile.TarError, EOFError, IndexError, zlib.error) as error:
            raise OSError(f"npm fetched a damaged {package}: {one_line(error)}") from error
    return target / "package"


def _render_all(directory: Path, archive: Path, captions_file: Path, resolution: int, all_concepts: bool) -> None:
    packages = directory / "packages"
    packages.mkdir(exist_ok=True)
    sets = {style: _IconSet(fetch(package, packages)) for style, (package, _) in STYLES.items()}
    labels = fetch(LABELS, packages)
    emoji = json.loads((labels / "en/data.json").read_text(encoding="utf-8"))
    names = [
        json.loads((labels / f"en/shortcodes/{source}.json").read_text(encoding="utf-8"))
        for source in ("github", "emojibase")
    ]
    everywhere = {e["label"]: e for e in emoji if all(s.find(e) is not None for s in sets.values())}
    chosen = list(everywhere) if all_concepts else concept_list()
    if missing := [label for label in chosen if label not in everywhere]:
        raise ValueError(f"not drawn in all six styles: {', '.join(missing)}")

    rows, captions, spoken = [], [], spoken_names()
    taken = {text.lower() for label in chosen for text in (label, _with_article(label))}
    tag_owners = _count(tag for label in chosen for tag in set(everywhere[label].get("tags", [])))
    for index, label in enumerate(tqdm(chosen, desc="drawing", unit="concept")):
        entry = everywhere[label]
        captions.append(_captions(entry, names, tag_owners, spoken.get(label, []), taken))
        for number, (style, icons) in enumerate(sets.items()):
            image = render(icons.svg(icons.find(entry)), resolution)
            rows.append((image, index, number, is_held_out(entry["hexcode"], style)))
    images, concept, style, held_out = zip(*rows, strict=True)
    with written_whole(archive) as temporary, temporary.open("wb") as file:
        np.savez(file, images=images, concept=concept, style=style, held_out=held_out)
    write_text(captions_file.with_name("styles.json"), json.dumps(list(STYLES)))  # for python -m evaluation
    write_text(captions_file, json.dumps(captions, indent=0))  # last, since it says that the data set is complete


def render(svg: str, resolution: int) -> np.ndarray:
    """Render an SVG => uint8 (resolution, resolution, 3) on white. It is rendered at twice the size and averaged."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * resolution, height=2 * resolution)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(
        Image.alpha_composite(white, picture).convert("RGB").resize((resolution, resolution), Image.Resampling.BOX)
    )


class _IconSet:
    """An iconify package. It finds an emoji's icon by code point, else by name, and wraps it as an SVG."""

    def __init__(self, package: Path) -> None:
        self._set = json.loads((package / "icons.json").read_text(encoding="utf-8"))
        self._by_code = json.loads((package / "chars.json").read_text(encoding="utf-8"))

    def find(self, emoji: dict) -> str | None:
        code = emoji["hexcode"].lower().replace("-fe0f", "")
        names = [self._by_code[code]] if code in self._by_code else _icon_names(emoji["label"])
        return next((name for name in names if name in self._set["icons"] or name in self._set["aliases"]), None)

    def svg(self, name: str) -> str:
        alias = self._set["aliases"].get(name)
        icon = self._set["icons"][alias["parent"] if alias else name]
        width = icon.get("width", self._set["width"])
        height = icon.get("height", self._set["height"])
        left, top = icon.get("left", 0), icon.get("top", 0)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )


def _icon_names(label: str) -> list[str]:
    """List the names that an icon of `label` may have. Emoji One has Unicode's names of 2016, such as "robot-face"."""
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    short = re.sub(r" \(.*\)$", "", label).lower().replace(" ", "-")  # without "(blood type)"
    old = [f"{name}-face", name.replace("cat", "cat-face"), f"heavy-{name}", f"flag-for-{name}", short]
    return [name, *old]


def concept_list() -> list[str]:
    """List the concepts that the default model learns."""
    lines = [line for line in CONCEPTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [label.strip() for line in lines for label in line.split(";")]


def spoken_names() -> dict[str, list[str]]:
    """Return what people call a concept, by its label."""
    lines = [line for line in NAMES.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {label: names.split(", ") for label, names in (line.split(": ", 1) for line in lines)}


def _captions(
    entry: dict, names: list[dict], tag_owners: dict[str, int], spoken: list[str], taken: set[str]
) -> list[str]:
    """List an emoji's captions, the label first, then everything else that people may call it.

    These are: label and spoken names, with and without an article; short names; unique tags; the label with tags. What
    is another emoji's label, with or without an article, is that emoji's caption alone. `taken` has these of all emoji.
    """
    label, tags = entry["label"], entry.get("tags", [])
    texts = [text for name in (label, *spoken) for text in (name, _with_article(name))]
    for source in names:
        found = source.get(entry["hexcode"], [])
        texts += [name.replace("_", " ") for name in ([found] if isinstance(found, str) else found)]
    texts += [tag for tag in tags if tag_owners[tag] == 1][:4]
    if tags:
        texts.append(f"{label}, {', '.join(tags[:3])}")
    own = {label, _with_article(label)}
    return [text for text in dict.fromkeys(texts) if text in own or text.lower() not in taken]


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _count(items) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts
