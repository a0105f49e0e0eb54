"""The canvas: it shows some pictures, as large as they fit, in a grid."""

import math
from collections.abc import Iterator

from PySide6.QtCore import QRectF, QSize, Qt
from PySide6.QtGui import QImage, QPainter, QPainterPath, QPaintEvent, QPen
from PySide6.QtWidgets import QSizePolicy, QWidget

GAP = 12  # pixels between pictures
LARGEST_SCALE = 6  # A picture of 64 pixels would be a blur if it filled the window.
ROUNDING = 10


class Canvas(QWidget):
    """Shows pictures, or a hint while there are none."""

    def __init__(self) -> None:
        super().__init__()
        self._images: list[QImage] = []
        self._hint = ""
        self._is_target = False
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
        self.setMinimumSize(240, 200)

    def sizeHint(self) -> QSize:
        """Return the size that a new window gives to the canvas."""
        return QSize(560, 420)

    def show_images(self, images: list[QImage], description: str) -> None:
        """Show images. The description is for screen readers."""
        self._images = images
        self.setAccessibleName(description)
        self.update()

    def show_hint(self, hint: str) -> None:
        """Show a text while there is no picture."""
        self._hint = hint
        if not self._images:
            self.setAccessibleName(hint)
        self.update()

    def mark_as_target(self, is_target: bool) -> None:
        """Show whether a picture that is dragged over the window may be dropped."""
        self._is_target = is_target
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:
        """Paint the pictures or the hint."""
        painter = QPainter(self)
        painter.setRenderHints(QPainter.RenderHint.Antialiasing | QPainter.RenderHint.SmoothPixmapTransform)
        if self._is_target or not self._images:
            self._paint_frame(painter)
        for image, place in zip(self._images, self._places(), strict=True):
            outline = QPainterPath()
            outline.addRoundedRect(place, ROUNDING, ROUNDING)
            painter.setClipPath(outline)
            painter.drawImage(place, image)
        painter.end()

    def _paint_frame(self, painter: QPainter) -> None:
        role = self.palette().highlight() if self._is_target else self.palette().mid()
        painter.setPen(QPen(role.color(), 2, Qt.PenStyle.DashLine))
        painter.drawRoundedRect(QRectF(self.rect()).adjusted(2, 2, -2, -2), ROUNDING, ROUNDING)
        if not self._images:
            painter.setPen(self.palette().placeholderText().color())
            painter.drawText(self.rect().adjusted(24, 24, -24, -24), _CENTERED, self._hint)

    def _places(self) -> Iterator[QRectF]:
        """Return the rectangle of each picture: the grid of the largest cells."""
        count = len(self._images)
        if not count:
            return
        scale, columns = max((self._scale(columns), -columns) for columns in range(1, count + 1))
        columns, rows = -columns, math.ceil(count / -columns)
        width, height = self._largest()
        cell_width, cell_height = scale * width, scale * height
        left = (self.width() - columns * (cell_width + GAP) + GAP) / 2
        top = (self.height() - rows * (cell_height + GAP) + GAP) / 2
        for index, image in enumerate(self._images):
            x = left + index % columns * (cell_width + GAP) + (cell_width - scale * image.width()) / 2
            y = top + index // columns * (cell_height + GAP) + (cell_height - scale * image.height()) / 2
            yield QRectF(x, y, scale * image.width(), scale * image.height())

    def _scale(self, columns: int) -> float:
        """Return by how much pictures grow or shrink in a grid of so many columns."""
        rows = math.ceil(len(self._images) / columns)
        width, height = self._largest()
        across = (self.width() - (columns - 1) * GAP) / columns / width
        down = (self.height() - (rows - 1) * GAP) / rows / height
        return max(min(across, down, LARGEST_SCALE), 0.01)

    def _largest(self) -> tuple[int, int]:
        return max(image.width() for image in self._images), max(image.height() for image in self._images)


_CENTERED = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextWordWrap
