"""Pictures: the image decoder's output as PIL images that carry their records."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, fromarray

if TYPE_CHECKING:
    from tiue_runtime.credentials import Credentials
    from tiue_runtime.record import Record

RECORD = "tiue"  # the key of a picture's record in `Image.info`


class Picture(Image):
    """A PIL image of a pipeline. `save` writes how it was made, and the mark "made by AI".

    `info["tiue"]` holds the record. Copies, crops and resized pictures keep it: it says how the original was made.
    """

    @classmethod
    def of(cls, image: Image) -> "Picture":
        """Turn a new image of PIL into a Picture. The two share their pixels."""
        picture = cls()
        picture.__dict__.update(image.__dict__)
        return picture

    @property
    def record(self) -> "Record | None":
        """How the picture was made, or None if it is not known."""
        return self.info.get(RECORD)

    def save(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        fp: str | os.PathLike[str] | IO[bytes],
        format: str | None = None,
        *,
        metadata: bool = True,
        ai_mark: bool = True,
        credentials: "Credentials | None" = None,
        **params: Any,
    ) -> None:
        """Save the picture as PNG, JPEG or WebP. A file is replaced only when the new one is complete.

        Args:
            fp: a file's name, or a file opened for writing bytes.
            format: "PNG", "JPEG" or "WEBP". None takes it from the name's ending.
            metadata: whether to write the record and webui's `parameters`.
            ai_mark: whether to write the mark "made by AI" (IPTC's DigitalSourceType in XMP).
            credentials: sign the file with content credentials (extra [c2pa]).
            **params: options of `PIL.Image.Image.save` for the format.

        Raises:
            RequestError: another format, or the metadata do not fit into it.
            OSError: the file cannot be written. An older file of that name is unchanged.
        """
        from tiue_runtime.saving import save_picture

        save_picture(self, fp, format, metadata=metadata, ai_mark=ai_mark, credentials=credentials, **params)

    def _new(self, im: Any) -> "Picture":
        """Make copies, crops and resized pictures Pictures as well."""
        return Picture.of(super()._new(im))


def to_unit(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn (B, 3, H, W) in [-1, 1] => float32 (B, H, W, 3) in [0, 1], clipped."""
    unit = np.clip(image.astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(unit.transpose(0, 2, 3, 1))


def to_pil(unit: NDArray[np.float32]) -> list[Image]:
    """Turn float32 (B, H, W, 3) in [0, 1] => B pictures in mode RGB, rounded to the nearest of 256 levels."""
    return [Picture.of(fromarray(pixels)) for pixels in np.round(unit * np.float32(255)).astype(np.uint8)]


def attach(pictures: Iterable[Image], records: "Iterable[Record]") -> None:
    """Give each picture its record, completed by the sha256 of its pixels."""
    for picture, record in zip(pictures, records, strict=True):
        picture.info[RECORD] = replace(record, pixels_sha256=hashlib.sha256(picture.tobytes()).hexdigest())
