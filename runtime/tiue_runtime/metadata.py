"""Metadata in picture files: webui's `parameters`, the JSON record, and the mark "made by AI". Writing and reading.

| | PNG | JPEG, WebP |
|---|---|---|
| parameters | text chunk `parameters` | EXIF UserComment, UTF-16, as webui writes it |
| record | text chunk `tiue` | XMP property `tiue:Record` |
| mark | XMP property `Iptc4xmpExt:DigitalSourceType` | the same |
"""

import html
import io
import re
import warnings
from typing import Any
from xml.sax.saxutils import quoteattr

from PIL import ExifTags
from PIL.Image import DecompressionBombError, DecompressionBombWarning, Exif, UnidentifiedImageError
from PIL.Image import open as open_image
from PIL.PngImagePlugin import PngInfo

from tiue_runtime import __version__
from tiue_runtime.errors import RequestError, clip, shorten
from tiue_runtime.host.forks import FILTERS
from tiue_runtime.record import MOST_BYTES, Record, parse_record

FORMATS = ("PNG", "JPEG", "WEBP")
AI_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a trained model made."""

_RECORD = "tiue"  # the text chunk of PNG files
_PARAMETERS = "parameters"
_XMP = "XML:com.adobe.xmp"  # the text chunk of PNG files
_JPEG_SEGMENT = 65_000  # bytes; a segment holds 65,533 with the name of its content
_UNICODE = b"UNICODE\0"  # the character code that begins UserComment
_IPTC = 'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
_TIUE = 'xmlns:tiue="urn:tiue:record:1"'
_PROPERTY = re.compile(r"""\btiue:Record\s*(?:=\s*(?:"([^"]*)"|'([^']*)')|>([^<]*)<)""")


def options_for(format: str, record: Record | None, ai_mark: bool) -> dict[str, Any]:
    """Return the options of `PIL.Image.Image.save` that write metadata.

    Args:
        format: one of FORMATS.
        record: None writes neither parameters nor record.
        ai_mark: whether to write the mark.

    Raises:
        RequestError: the record is too long for the format.
    """
    text = None if record is None else record.to_json()
    if text and len(text) > MOST_BYTES:
        raise _too_long(len(text), MOST_BYTES, "")
    if format == "PNG":
        return _png(record, text, ai_mark)
    options: dict[str, Any] = {}
    if text or ai_mark:
        options["xmp"] = _xmp(ai_mark, text).encode("ascii")
    if record:
        exif = Exif()
        exif[ExifTags.Base.Software] = f"tiue-runtime {__version__}"
        comment = _UNICODE + record.parameters().encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        options["exif"] = exif.tobytes()
    longest = max(map(len, options.values()), default=0)
    if format == "JPEG" and longest > _JPEG_SEGMENT:
        raise _too_long(longest, _JPEG_SEGMENT, "save it as PNG or WebP, or ")
    return options


def _png(record: Record | None, text: str | None, ai_mark: bool) -> dict[str, Any]:
    if not (record and text) and not ai_mark:
        return {}
    info = PngInfo()
    if record and text:
        parameters = record.parameters()
        add = info.add_text if parameters.isascii() else info.add_itxt
        add(_PARAMETERS, parameters)
        info.add_text(_RECORD, text)
        info.add_text("Software", f"tiue-runtime {__version__}")
    if ai_mark:
        info.add_itxt(_XMP, _xmp(True, None))
    return {"pnginfo": info}


def _too_long(size: int, most: int, remedy: str) -> RequestError:
    return RequestError(
        f"prompt: it is too long for the picture's metadata, {size:,} bytes of at most {most:,}: {remedy}"
        "pass metadata=False"
    )


def _xmp(ai_mark: bool, text: str | None) -> str:
    """Return XMP in ASCII with the mark, the record, or both."""
    mark = f' {_IPTC} Iptc4xmpExt:DigitalSourceType="{AI_SOURCE}"' if ai_mark else ""
    record = f" {_TIUE} tiue:Record={quoteattr(text)}" if text else ""
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about=""{mark}{record}/></rdf:RDF></x:xmpmeta>'
    )


def read_metadata(data: bytes) -> Record:
    """Read the record of a picture from its whole file. Its pixels are not decoded.

    Raises:
        RequestError: the data are no picture in one of FORMATS, or hold no record, or a damaged one.
    """
    info, comment = _fields(data)
    found = info.get(_RECORD)
    if not isinstance(found, str):
        xmp = info.get("xmp", b"")
        match = _PROPERTY.search(xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp))
        found = html.unescape(next(filter(None, match.groups()), "")) if match else None
    if found is None:
        parameters = info.get(_PARAMETERS, comment)
        raise RequestError(f"expected the record of a picture by tiue-runtime, {_foreign(parameters)}")
    return parse_record(found.encode("utf-8", "surrogatepass"))


def _fields(data: bytes) -> tuple[dict[Any, Any], str]:
    """Return the metadata that Pillow finds, and the text of EXIF's UserComment."""
    try:
        # Pixels are not decoded, so their number does no harm. Pillow also warns of damaged tags.
        quiet = warnings.catch_warnings(action="ignore")
        with FILTERS.hold(), quiet, open_image(io.BytesIO(data), formats=FORMATS) as image:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
            return dict(image.info), _decoded(comment)
    except (DecompressionBombError, DecompressionBombWarning) as error:
        raise RequestError(f"expected a picture of a size that can be decoded, {clip(str(error))}") from error
    except UnidentifiedImageError as error:
        raise RequestError("expected a picture in PNG, JPEG or WebP, but it is none") from error
    except Exception as error:  # Pillow raises errors of many kinds for damaged files.
        raise RequestError(f"expected a picture in PNG, JPEG or WebP, but it is damaged: {clip(str(error))}") from error


def _decoded(comment: object) -> str:
    if not isinstance(comment, bytes):
        return ""
    if comment.startswith(_UNICODE):
        return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
    return comment[8:].decode("utf-8", "replace")


def _foreign(parameters: object) -> str:
    """Say what a picture without a record says in webui's text."""
    text = parameters if isinstance(parameters, str) else ""
    *prompt, last = text[: 2**16].strip().split("\n")
    found = re.findall(r"\b(Steps|Seed|Size|Model): ([^,]{1,40})", last)
    if not found:
        return "found none"
    said = ", ".join(f"{key.lower()} {value}" for key, value in found)
    wanted = "\n".join(prompt).partition("\nNegative prompt:")[0]
    return f"found the text of another program: prompt {shorten(wanted)}, {clip(said)}. Pass what you need yourself"
