"""PNG files with their parameters as metadata."""

from collections.abc import Mapping
from pathlib import Path

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from tiue_runtime.bundle.replacing import check_writable, replacing
from tiue_runtime.errors import RequestError, clip

_SHOWN = 300  # characters of a path in a message


def check_png_path(path: Path) -> None:
    """Raise RequestError unless a PNG can be written to `path`. Tests the folder by writing to it."""
    if path.suffix.lower() != ".png":
        raise RequestError(f"out: expected a file name that ends in .png, got {str(path)!r}")
    try:
        if path.is_dir():
            raise RequestError(f"out: expected a file name, but {path} is a directory")
        check_writable(path)
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"out: cannot write {clip(str(path), _SHOWN)}: {_reason(error)}") from error


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def save_png(image: Image, path: Path, text: Mapping[str, str]) -> None:
    """Write a PNG with `text` as its metadata: to a temporary file first, then rename it. Raises OSError."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    with replacing(path) as file:
        image.save(file, format="PNG", pnginfo=info)
