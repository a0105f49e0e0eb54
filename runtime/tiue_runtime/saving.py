"""Files of pictures: PNG, JPEG and WebP by the name's ending, written whole or not at all, with their metadata."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from tiue_runtime.bundle.directory import read_limited
from tiue_runtime.bundle.replacing import check_writable, replacing
from tiue_runtime.errors import BundleError, RequestError, clip, reason, remedy, shorten
from tiue_runtime.images import RECORD
from tiue_runtime.metadata import FORMATS, options_for, read_metadata
from tiue_runtime.record import Record

if TYPE_CHECKING:
    from tiue_runtime.credentials import Credentials

ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LARGEST_FILE = 256 * 2**20  # bytes of a picture whose record is read

_SHOWN = 300  # characters of a path in a message
_DEFAULTS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"quality": 95}}


def check_picture_path(path: str | os.PathLike[str], name: str = "out") -> None:
    """Raise RequestError unless a picture can be saved to `path`. Tests the folder by writing to it.

    Args:
        path: of the file.
        name: of the argument, for the message.
    """
    path = Path(path)
    _format_of(path, name)
    try:
        if path.is_dir():
            raise RequestError(f"{name}: expected a file name, but {path} is a directory")
        check_writable(path)
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        said = ": ".join(filter(None, (reason(error), remedy(error))))
        raise RequestError(f"{name}: cannot write {clip(str(path), _SHOWN)}: {said}") from error


def numbered(path: Path, count: int) -> Iterator[Path]:
    """Name the files of several pictures: heart.png for one, heart-1.png, heart-2.png and so on for more."""
    if count <= 1:
        yield path
        return
    digits = len(str(count))
    for i in range(count):
        yield path.with_stem(f"{path.stem}-{i + 1:0{digits}}")


def save_picture(
    image: Image,
    target: str | os.PathLike[str] | IO[bytes],
    format: str | None = None,
    *,
    metadata: bool = True,
    ai_mark: bool = True,
    credentials: "Credentials | None" = None,
    overwrite: bool = True,
    **options: Any,
) -> None:
    """Save a picture. `Picture.save` describes the arguments and the errors.

    Without `overwrite`, a file that exists is an error: FileExistsError.
    """
    path = None if hasattr(target, "write") else Path(target)  # pyright: ignore[reportArgumentType]
    format = _format_of(path, "path") if format is None and path else _format(format)
    record = image.info.get(RECORD) if metadata else None
    added = options_for(format, record if isinstance(record, Record) else None, ai_mark)
    if isinstance(options.get("pnginfo"), PngInfo) and "pnginfo" in added:
        # Gradio passes one, even an empty one. Readers take the last chunk of a name, which is ours.
        added["pnginfo"].chunks[:0] = options.pop("pnginfo").chunks
    for name in added:
        if name in options:
            raise RequestError(
                f"{name}: the record and the mark are written there; "
                f"pass metadata=False and ai_mark=False to write your own"
            )
    encoded = io.BytesIO()
    try:
        Image.save(image, encoded, format, **{**_DEFAULTS.get(format, {}), **options, **added})
    except ValueError as error:  # for example a picture that is larger than the format allows
        raise RequestError(f"the picture cannot be written as {format}: {clip(str(error))}") from error
    data = encoded.getbuffer() if credentials is None else credentials.sign(encoded.getvalue(), format)
    if path is None:
        target.write(data)  # pyright: ignore
        return
    try:
        with replacing(path, overwrite) as file:
            file.write(data)
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read how a picture was made from its file. The pixels are not decoded.

    Raises:
        RequestError: the file is no picture in PNG, JPEG or WebP, or holds no record, or a damaged one. If it holds
            webui's `parameters` of another program, the message says what they say.
    """
    shown = clip(os.fspath(path), _SHOWN)
    try:
        return read_metadata(read_limited(Path(path), LARGEST_FILE))
    except (BundleError, RequestError, ValueError) as error:  # ValueError: a name with NUL
        raise RequestError(f"{shown}: {error}") from error


def _format_of(path: Path, name: str) -> str:
    format = ENDINGS.get(path.suffix.lower())
    if format is None:
        raise RequestError(
            f"{name}: expected a file name that ends in {', '.join(ENDINGS)}, got {clip(str(path), _SHOWN)!r}"
        )
    return format


def _format(format: object) -> str:
    name = format.upper().replace("JPG", "JPEG") if isinstance(format, str) else ""
    if name not in FORMATS:
        raise RequestError(f"format: expected one of {', '.join(FORMATS)}, got {shorten(format)}")
    return name
