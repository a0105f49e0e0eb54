"""One picture that shows all pictures of a command."""

import math
from collections.abc import Sequence

from PIL.Image import Image
from PIL.Image import new as new_image

from tiue_runtime.errors import RequestError
from tiue_runtime.images import Picture

MOST_PIXELS = 2**26
_LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # pixels; limits of the formats
_GAPS = 32  # The gap between pictures is this part of their width.


class Sheet:
    """The layout of a contact sheet: rows from left to right, in the order of the pictures.

    Args:
        prompts: how many prompts there are. If each has several pictures, it gets a row of its own.
        num_images: pictures of each prompt.
        width: of a picture, in pixels.
        height: of a picture, in pixels.
    """

    def __init__(self, prompts: int, num_images: int, width: int, height: int) -> None:
        count = prompts * num_images
        self.columns = num_images if prompts > 1 and num_images > 1 else math.ceil(math.sqrt(count))
        self.rows = -(-count // self.columns)
        self._cell = width, height
        self._gap = max(width // _GAPS, 1)
        self.width = self.columns * (width + self._gap) + self._gap
        self.height = self.rows * (height + self._gap) + self._gap

    def check(self, format: str) -> None:
        """Raise RequestError if the sheet is too large for a format, "PNG", "JPEG" or "WEBP"."""
        longest = _LONGEST_SIDE.get(format, MOST_PIXELS)
        if max(self.width, self.height) > longest or self.width * self.height > MOST_PIXELS:
            raise RequestError(
                f"grid: a sheet of {self.columns}x{self.rows} pictures has {self.width}x{self.height} pixels, more "
                f"than {format} or memory should hold; save fewer pictures, or leave out --grid"
            )

    def make(self, pictures: Sequence[Image]) -> Image:
        """Return the sheet, on white."""
        sheet = new_image("RGB", (self.width, self.height), "white")
        for i, picture in enumerate(pictures):
            row, column = divmod(i, self.columns)
            corner = (
                offset * (side + self._gap) + self._gap for offset, side in zip((column, row), self._cell, strict=True)
            )
            sheet.paste(picture, tuple(corner))  # pyright: ignore[reportArgumentType]
        return Picture.of(sheet)
