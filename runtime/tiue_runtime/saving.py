"""Pictures in files: PNG, JPEG and WebP, with the record of their making and a mark that says "made by AI".

The mark is the property DigitalSourceType of IPTC, with the value trainedAlgorithmicMedia, in the file's XMP. Programs
that show or check pictures read it there. The European Union's AI Act asks for such a mark (Article 50(2)).
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from xml.sax.saxutils import escape, unescape

from PIL import ExifTags, UnidentifiedImageError
from PIL.Image import DecompressionBombError, Exif, Image
from PIL.Image import open as open_image
from PIL.PngImagePlugin import PngInfo

from tiue_runtime.bundle.replacing import check_writable, replacing
from tiue_runtime.errors import RequestError, clip
from tiue_runtime.record import Record

if TYPE_CHECKING:
    from PIL._typing import StrOrBytesPath

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MARK = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
RECORD = "tiue"  # the name of the record in a PNG
PARAMETERS = "parameters"  # the name of stable-diffusion-webui's text in a PNG
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""{}/></rdf:RDF>'
    '</x:xmpmeta><?xpacket end="w"?>'
)
_MARK = ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="{}"'
_RECORD = ' xmlns:tiue="urn:tiue:record:1" tiue:record="{}"'
_QUOTES = {'"': "&quot;"}
_SHOWN = 300  # characters of a path in a message


class Picture(Image):
    """A picture of PIL's that knows how it was made. Copies, crops and other changes of it are plain pictures."""

    record: Record | None = None

    @classmethod
    def of(cls, image: Image, record: Record) -> "Picture":
        """Give a record to a picture. The two share their pixels."""
        picture = cls()
        picture.__dict__.update(image.__dict__)
        picture.record = record
        return picture

    def save(
        self,
        fp: "StrOrBytesPath | IO[bytes]",
        format: str | None = None,  # PIL's name of it
        *,
        metadata: bool = True,
        ai_mark: bool = True,
        **params: Any,
    ) -> None:
        """Save as PIL does. PNG, JPEG and WebP also get the record and the mark.

        Args:
            fp: a path, which is written whole or not at all, or an open file.
            format: PIL's name of the format. None: the ending of the path decides.
            metadata: write the record and the text of parameters.
            ai_mark: write the mark that says "made by AI".
            **params: PIL's, for example quality. A `pnginfo`, `exif` or `xmp` of the caller's replaces ours.

        Raises:
            RequestError: the record is too long for the format.
            ValueError, OSError: as PIL's.
        """
        path = Path(os.fsdecode(fp)) if isinstance(fp, str | bytes | os.PathLike) else None
        suffix = path.suffix.lower() if path else ""
        kind = format.upper() if format else FORMATS.get(suffix)
        if kind == "JPG":
            kind = "JPEG"
        record = self.record if metadata else None
        ours = _metadata(kind, record, ai_mark) if kind and kind in FORMATS.values() else {}
        given = {**ours, **params}
        try:
            if path and kind:
                with replacing(path) as file:
                    super().save(file, kind, **given)
            else:
                super().save(fp, format, **given)
        except ValueError as error:
            if "too long" not in str(error) or not ours:
                raise
            raise RequestError(
                f"metadata: {kind} holds at most 64 KiB of it, and this picture has more; "
                "save a PNG, or without metadata"
            ) from error


def _metadata(kind: str, record: Record | None, ai_mark: bool) -> dict[str, Any]:
    """Return PIL's arguments for a format."""
    in_xmp = record is not None and kind != "PNG"
    mark = _MARK.format(MARK) if ai_mark else ""
    xmp = mark + (_RECORD.format(escape(record.to_json(), _QUOTES)) if record is not None and in_xmp else "")
    packet = _XMP.format(xmp) if xmp else ""
    if kind == "PNG":
        info = PngInfo()
        if record is not None:
            text = record.to_text()
            info.add_itxt(PARAMETERS, text) if not text.isascii() else info.add_text(PARAMETERS, text)
            info.add_text(RECORD, record.to_json())
        if packet:
            info.add_itxt("XML:com.adobe.xmp", packet)
        return {"pnginfo": info}
    found: dict[str, Any] = {"xmp": packet.encode()} if packet else {}
    if record is not None:
        exif = Exif()
        # EXIF's own prefix for UTF-16, as stable-diffusion-webui writes it.
        comment = b"UNICODE\0" + record.to_text().encode("utf-16-be")
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
        found["exif"] = exif
    return found


def read_record(path: str | Path) -> Record:
    """Read the record of a picture that this package saved.

    Args:
        path: a PNG, JPEG or WebP file.

    Raises:
        RequestError: the file cannot be read, is no such picture, or has no record or a damaged one.
    """
    path = Path(path)
    shown = clip(str(path), _SHOWN)
    try:
        if not path.is_file():
            raise RequestError(f"picture: expected a file, got {shown}")
        with open_image(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.format == "PNG":
                image.load()  # Text may follow the pixels.
            text = _record_text(image.info)
    except RequestError:
        raise
    except UnidentifiedImageError as error:
        raise RequestError(f"picture: expected a PNG, JPEG or WebP file, got {shown}") from error
    except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
        raise RequestError(f"picture: {shown} cannot be read: {clip(str(error))}") from error
    if text is None:
        raise RequestError(f"picture: {shown} has no record of its making; it may have been saved without, or edited")
    return Record.from_json(text)


def _record_text(info: dict[Any, Any]) -> str | None:
    """Return the record in PIL's `Image.info`, or None."""
    text = info.get(RECORD)
    if isinstance(text, str):
        return str(text)
    xmp = info.get("xmp")
    found = re.search(rb'tiue:record="([^"]*)"', xmp) if isinstance(xmp, bytes) else None
    return unescape(found[1].decode("utf-8", "replace"), {"&quot;": '"'}) if found else None


def check_picture_path(path: Path) -> None:
    """Raise RequestError unless a picture can be written to `path`. Tests the folder by writing to it."""
    if path.suffix.lower() not in FORMATS:
        raise RequestError(
            f"out: expected a file name that ends in {', '.join(FORMATS)}, got {clip(str(path), _SHOWN)!r}"
        )
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


def save_all(images: object, path: Path, *, metadata: bool, ai_mark: bool) -> list[Path]:
    """Save the pictures of a result. See `Result.save`."""
    if not isinstance(images, list) or not all(isinstance(image, Picture) for image in cast(list[object], images)):
        raise RequestError('save: expected pictures, but output_type="np" and "latent" give arrays')
    pictures = cast(list[Picture], images)
    paths = list(numbered(path, len(pictures)))
    for one in paths:
        check_picture_path(one)
    for one, picture in zip(paths, pictures, strict=True):
        picture.save(one, metadata=metadata, ai_mark=ai_mark)
    return paths


def numbered(path: Path, count: int) -> Iterator[Path]:
    """Name the files of several pictures: heart.png for one, heart-1.png, heart-2.png and so on for more."""
    if count <= 1:
        yield path
        return
    digits = len(str(count))
    for i in range(count):
        yield path.with_stem(f"{path.stem}-{i + 1:0{digits}}")
