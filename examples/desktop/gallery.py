"""The gallery: a row of the pictures that were made, the newest first."""

from PIL.Image import Image
from PySide6.QtCore import QSize, Qt, Signal
from PySide6.QtGui import QIcon, QPixmap
from PySide6.QtWidgets import QAbstractItemView, QListView, QListWidget, QListWidgetItem
from tiue_runtime import Record

from examples.desktop.artist import to_qimage

SIDE = 72  # pixels of a small picture
MOST = 500  # pictures that are kept; the oldest go first


class Gallery(QListWidget):
    """Holds pictures. The user selects those that the window shows and saves."""

    selected = Signal(list)  # the selected pictures, the newest first

    def __init__(self) -> None:
        super().__init__()
        self.setViewMode(QListView.ViewMode.IconMode)
        self.setFlow(QListView.Flow.LeftToRight)
        self.setWrapping(False)
        self.setMovement(QListView.Movement.Static)
        self.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.setIconSize(QSize(SIDE, SIDE))
        self.setSpacing(4)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setFixedHeight(SIDE + 46)
        self.setAccessibleName("Gallery")
        self.itemSelectionChanged.connect(lambda: self.selected.emit(self.pictures()))

    def add(self, pictures: list[Image]) -> None:
        """Put new pictures first, and select them."""
        self.blockSignals(True)
        self.clearSelection()
        for picture in reversed(pictures):
            item = QListWidgetItem(_icon(picture), "")
            item.setData(Qt.ItemDataRole.UserRole, picture)
            item.setData(Qt.ItemDataRole.AccessibleTextRole, caption(picture))
            item.setToolTip(caption(picture))
            self.insertItem(0, item)
            item.setSelected(True)
        while self.count() > MOST:
            self.takeItem(self.count() - 1)
        self.blockSignals(False)
        self.setCurrentRow(0, self.selectionModel().SelectionFlag.NoUpdate)
        self.scrollToTop()
        self.itemSelectionChanged.emit()

    def pictures(self) -> list[Image]:
        """Return the selected pictures, the newest first."""
        items = sorted(self.selectedItems(), key=self.row)
        return [item.data(Qt.ItemDataRole.UserRole) for item in items]


def caption(picture: Image) -> str:
    """Return what made a picture, in one line."""
    record: Record = picture.info["tiue"]
    return f"{record.prompt}  ·  seed {record.seed}  ·  {record.width}x{record.height}"


def _icon(picture: Image) -> QIcon:
    pixmap = QPixmap.fromImage(to_qimage(picture))
    mode = Qt.TransformationMode.SmoothTransformation
    scaled = pixmap.scaled(SIDE, SIDE, Qt.AspectRatioMode.KeepAspectRatio, mode)
    icon = QIcon()
    for state in (QIcon.Mode.Normal, QIcon.Mode.Selected):  # Qt would tint a selected picture.
        icon.addPixmap(scaled, state)
    return icon
