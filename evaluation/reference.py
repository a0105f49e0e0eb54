"""Reference pictures: a folder of files, or an NPZ archive of drawings with concepts and styles."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image

from tiue.files import one_line

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_NONE = np.zeros(0, np.int64)


class Pictures(Protocol):
    """Pictures that are read when they are asked for; an array is one, too."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        """A slice or numbers of pictures => uint8 (n, H, W, 3)."""
        ...


@dataclass(frozen=True)
class Reference:
    """Pictures that others are compared with. Row i of every array is one picture.

    Attributes:
        pictures: the pictures.
        concept: int64 (n,), an index into `captions`; empty if the pictures have none.
        style: int64 (n,), an index into `styles`; empty likewise.
        captions: per concept, its captions without a style word; the first is its label.
        styles: the words of the styles.
    """

    pictures: Pictures
    concept: NDArray[np.int64] = field(default_factory=lambda: _NONE)
    style: NDArray[np.int64] = field(default_factory=lambda: _NONE)
    captions: list[list[str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)

    def require_concepts(self) -> None:
        """Raise ValueError unless every picture has a concept and a style."""
        if not (len(self.concept) == len(self.style) == len(self.pictures) and self.captions and self.styles):
            raise ValueError(
                "the drawings have no concepts and styles: expected an NPZ with `concept` and `style`, "
                "and captions.json and styles.json beside it"
            )

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Go through the pictures, `size` at a time."""
        for start in range(0, len(self.pictures), size):
            yield self.pictures[start : start + size]


class Files:
    """Pictures in files, cut to squares in the middle and scaled to one size.

    Args:
        paths: the files.
        size: height and width that they get, pixels.
    """

    def __init__(self, paths: list[Path], size: int):
        self._paths, self._size = paths, size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        """Read some pictures, uint8 (n, size, size, 3)."""
        chosen = self._paths[rows] if isinstance(rows, slice) else [self._paths[row] for row in rows]
        return np.stack([self._read(path) for path in chosen])

    def _read(self, path: Path) -> NDArray[np.uint8]:
        try:
            with Image.open(path) as file:
                return square(file, self._size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow has them
            raise ValueError(f"{path}: expected a picture: {one_line(error)}") from error


def square(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Put a picture on white, cut it to a square in the middle, and scale it: uint8 (size, size, 3)."""
    rgba = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    side = min(flat.size)
    left, top = (flat.width - side) // 2, (flat.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS, box))


def load_reference(path: Path, size: int = 512) -> Reference:
    """Read reference pictures.

    Args:
        path: a folder of PNG, JPEG or WebP files, also in subfolders. Or an NPZ with `images`, uint8 (n, H, W, 3), and
            perhaps `concept` and `style`, int64 (n,). Beside the NPZ, captions.json has the captions of each concept,
            the label first, and styles.json the words of the styles.
        size: height and width that pictures of files get, pixels.

    Raises:
        ValueError: there are no pictures, or a file is damaged.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise ValueError(f"{path}: expected PNG, JPEG or WebP files, found none")
        return Reference(Files(files, size))
    content = read_arrays(path, ("images", "concept", "style"), "a folder of pictures or an NPZ")
    images = content.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        found = "none" if images is None else f"{images.dtype} {images.shape}"
        raise ValueError(f"{path}: expected `images`, uint8 (n, H, W, 3), got {found}")
    numbers = {name: content[name] for name in ("concept", "style") if name in content}
    captions, styles = path.with_name("captions.json"), path.with_name("styles.json")
    reference = Reference(
        images,
        **numbers,
        captions=read_captions(captions) if captions.exists() else [],
        styles=_texts(styles, read_json(styles)) if styles.exists() else [],
    )
    _check(path, reference)
    return reference


def read_arrays(path: Path, names: Sequence[str], expected: str = "an NPZ") -> dict[str, NDArray[Any]]:
    """Read those arrays of an NPZ archive that it has. Raises ValueError, which names the file and what is expected."""
    try:
        with path.open("rb") as file:  # np.load itself would leave a damaged one open.
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, NpzFile):
                raise ValueError(f"found {type(arrays).__name__}")
            return {name: arrays[name] for name in names if name in arrays}
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected {expected}: {one_line(error)}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError, which names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {one_line(error)}") from error


def read_captions(path: Path) -> list[list[str]]:
    """Read the captions of each concept, the label first. Raises ValueError, which names the file."""
    found = read_json(path)
    if not isinstance(found, list) or not all(found):
        raise ValueError(f"{path}: expected a list with the captions of each concept")
    return [_texts(path, captions) for captions in found]


def _texts(path: Path, found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{path}: expected lists of texts, got {one_line(repr(found), 100)}")
    return found


def _check(path: Path, reference: Reference) -> None:
    """Raise ValueError unless concepts and styles are numbers of those that have names."""
    for name, numbers in (("concept", reference.concept), ("style", reference.style)):
        if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(f"{path}: expected `{name}`, int64 (n,), got {numbers.dtype} {numbers.shape}")
    for name, numbers, names in (
        ("concept", reference.concept, reference.captions),
        ("style", reference.style, reference.styles),
    ):
        if (
            len(numbers)
            and names
            and not (len(numbers) == len(reference.pictures) and numbers.min() >= 0 and numbers.max() < len(names))
        ):
            raise ValueError(
                f"{path}: expected one `{name}` in 0..{len(names) - 1} for each of {len(reference.pictures)} pictures, "
                f"got {len(numbers)} in {numbers.min()}..{numbers.max()}"
            )
