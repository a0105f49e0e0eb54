"""The window."""

import re
from pathlib import Path

from PIL.Image import Image
from PySide6.QtCore import Qt, QThreadPool, Signal
from PySide6.QtGui import (
    QCloseEvent,
    QDragEnterEvent,
    QDragLeaveEvent,
    QDropEvent,
    QImage,
    QKeySequence,
    QRegularExpressionValidator,
    QShortcut,
)
from PySide6.QtWidgets import (
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)
from tiue_runtime import TiueError

from examples.desktop.artist import Artist, Wish, to_qimage
from examples.desktop.canvas import Canvas
from examples.desktop.gallery import Gallery, caption

MOST_PICTURES = 9  # of one wish
PICTURES = "Pictures (*.png *.jpg *.jpeg *.webp)"
_LARGEST_SEED = 2**64 - MOST_PICTURES


class Window(QWidget):
    """Turns what the user does into calls of the artist, and shows what the artist tells."""

    saved = Signal(str, bool)  # a message, and whether it is an error

    def __init__(self, artist: Artist) -> None:
        super().__init__()
        self._artist = artist
        self._busy = self._loaded = False
        self.setWindowTitle("TiUE")
        self.setAcceptDrops(True)
        self._build()
        self._connect()
        self._load()

    def _build(self) -> None:
        """Make the parts of the window, and lay them out."""
        self.prompt = QLineEdit(objectName="prompt", placeholderText="What shall I draw?", accessibleName="Prompt")
        self.draw = QPushButton("Draw", objectName="draw")
        self.count = QSpinBox(
            minimumHeight=34, minimumWidth=56, minimum=1, maximum=MOST_PICTURES, accessibleName="Number of pictures"
        )
        self.seed = QLineEdit(placeholderText="a new one", accessibleName="Seed", maximumWidth=190)
        self.seed.setValidator(QRegularExpressionValidator("[0-9]{0,20}"))
        self.repeat = QPushButton("Repeat a picture…", toolTip="Make a saved picture again (Ctrl+O)", enabled=False)
        self.save = QPushButton("Save…", toolTip="Save the selected pictures (Ctrl+S)", enabled=False)
        self._canvas = Canvas()
        self._bar = QProgressBar(maximum=1000, textVisible=False, accessibleName="Progress")
        self._bar.setFixedHeight(6)
        self._caption = QLabel(objectName="quiet", wordWrap=True, textFormat=Qt.TextFormat.PlainText)
        self._notice = QLabel(objectName="notice", wordWrap=True, textFormat=Qt.TextFormat.PlainText, visible=False)
        self._notice.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self._gallery = Gallery()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(20, 20, 20, 20)
        layout.setSpacing(12)
        layout.addLayout(_row(self.prompt, self.draw))
        number, seed = QLabel("Pictures", buddy=self.count), QLabel("Seed", buddy=self.seed)
        layout.addLayout(_row(number, self.count, seed, self.seed, None, self.repeat))
        layout.addWidget(self._notice)
        layout.addWidget(self._canvas, 1)
        layout.addWidget(self._bar)
        layout.addLayout(_row(self._caption, self.save))
        layout.addWidget(self._gallery)
        self._caption.setMinimumWidth(1)

    def _connect(self) -> None:
        self.draw.clicked.connect(self._press)
        self.prompt.returnPressed.connect(self._draw)
        self.repeat.clicked.connect(self._choose_picture)
        self.save.clicked.connect(self._choose_file)
        for keys, function in (
            (QKeySequence.StandardKey.Open, self._choose_picture),
            (QKeySequence.StandardKey.Save, self._choose_file),
            (QKeySequence.StandardKey.Cancel, self._artist.cancel),
            (QKeySequence.StandardKey.Quit, self.close),
        ):
            QShortcut(QKeySequence(keys), self, function)
        self._gallery.selected.connect(self._show_selected)
        self.saved.connect(self._tell)
        artist = self._artist
        artist.loaded.connect(self._on_loaded)
        artist.unavailable.connect(self._on_unavailable)
        artist.began.connect(self._on_began)
        artist.progressed.connect(self._on_progressed)
        artist.finished.connect(self._on_finished)
        artist.failed.connect(self._on_failed)
        artist.cancelled.connect(self._on_cancelled)

    # What the user does.

    def _press(self) -> None:
        """Do what the large button says: draw, cancel, or load the model again."""
        if self._busy:
            self._artist.cancel()
        elif self._loaded:
            self._draw()
        else:
            self._load()

    def _load(self) -> None:
        self._notice.hide()
        self._canvas.show_hint("Loading the model…")
        self.draw.setEnabled(False)
        self._artist.load()

    def _draw(self) -> None:
        if self._busy or not self._loaded:
            return
        prompt, seed = self.prompt.text().strip(), self.seed.text()
        if not prompt:
            self._tell("Say what the picture shows, for example: a red heart", True)
            self.prompt.setFocus()
            return
        if seed and int(seed) > _LARGEST_SEED:
            self._tell(f"The seed is a number from 0 to {_LARGEST_SEED}.", True)
            self.seed.setFocus()
            return
        self._set_busy(True)
        self._artist.draw(Wish(prompt, self.count.value(), int(seed) if seed else None))

    def _choose_picture(self) -> None:
        if self.repeat.isEnabled():
            path, _ = QFileDialog.getOpenFileName(self, "Repeat a picture", "", PICTURES)
            if path:
                self.repeat_file(Path(path))

    def repeat_file(self, path: Path) -> None:
        """Make a saved picture again."""
        if self._busy or not self._loaded:
            reason = "Wait until this drawing is done, or cancel it first." if self._busy else "No model is loaded yet."
            self._tell(reason, True)
            return
        self._set_busy(True)
        self._artist.repeat(path)

    def _choose_file(self) -> None:
        pictures = self._gallery.pictures()
        if pictures:
            path, _ = QFileDialog.getSaveFileName(self, "Save", _file_name(pictures[0]), PICTURES)
            if path:
                self.save_pictures(pictures, Path(path))

    def save_pictures(self, pictures: list[Image], path: Path) -> None:
        """Save pictures on another thread, because a disk may be slow. `saved` follows."""
        QThreadPool.globalInstance().start(lambda: self.saved.emit(*_save(pictures, path)))

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        """Accept one file."""
        if _dropped(event) is not None:
            event.acceptProposedAction()
            self._canvas.mark_as_target(True)

    def dragLeaveEvent(self, event: QDragLeaveEvent) -> None:
        """Forget the file."""
        self._canvas.mark_as_target(False)

    def dropEvent(self, event: QDropEvent) -> None:
        """Repeat the picture that was dropped."""
        self._canvas.mark_as_target(False)
        path = _dropped(event)
        if path is not None:
            event.acceptProposedAction()
            self.repeat_file(path)

    def closeEvent(self, event: QCloseEvent) -> None:
        """Stop drawing. The window goes at once."""
        self._artist.close()
        event.accept()

    # What the artist tells.

    def _on_loaded(self, model: str) -> None:
        self.setWindowTitle(f"TiUE: {model}")
        self._canvas.show_hint("Say what to draw, or drop a picture that was made here to make it again.")
        self._loaded = True
        self.draw.setText("Draw")
        self.draw.setEnabled(True)
        self.repeat.setEnabled(True)
        self.prompt.setFocus()

    def _on_unavailable(self, reason: str) -> None:
        self._canvas.show_hint("There is no model to draw with.")
        self.draw.setText("Try again")
        self.draw.setEnabled(True)
        self._tell(reason, True)

    def _on_began(self) -> None:
        self._notice.hide()
        self._caption.setText("Drawing…")

    def _on_progressed(self, fraction: float, previews: list[QImage]) -> None:
        self._bar.setValue(round(1000 * fraction))
        if previews:
            self._canvas.show_images(previews, "Preview of the picture that is being drawn")

    def _on_finished(self, pictures: list[Image], warning: str) -> None:
        self._set_busy(False)
        self._gallery.add(pictures)
        if warning:
            self._tell(warning, False)

    def _on_failed(self, reason: str) -> None:
        self._set_busy(False)
        self._show_selected(self._gallery.pictures())
        self._tell(f"No picture: {reason}", True)

    def _on_cancelled(self) -> None:
        self._set_busy(False)
        self._show_selected(self._gallery.pictures())
        self._caption.setText("Cancelled.")

    # What the window shows.

    def _show_selected(self, pictures: list[Image]) -> None:
        self.save.setEnabled(bool(pictures))
        if self._busy:
            return
        captions = [caption(picture) for picture in pictures]
        self._canvas.show_images([to_qimage(picture) for picture in pictures], "; ".join(captions))
        self._caption.setText(captions[0] if len(captions) == 1 else f"{len(captions)} pictures" if captions else "")

    def _tell(self, message: str, is_error: bool) -> None:
        """Show a message above the picture."""
        self._notice.setText(f"{message[0].upper()}{message[1:]}")
        self._notice.setAccessibleName("Error" if is_error else "Note")
        self._notice.show()

    def _set_busy(self, busy: bool) -> None:
        self._busy = busy
        self._bar.setValue(0)
        self.draw.setText("Cancel" if busy else "Draw")
        self.repeat.setEnabled(not busy)


def _row(*parts: QWidget | None) -> QHBoxLayout:
    """Lay out widgets side by side. None is a space that grows, and the first field takes what is left."""
    row = QHBoxLayout()
    row.setSpacing(10)
    for part in parts:
        if part is None:
            row.addStretch(1)
        else:
            row.addWidget(part, 1 if part is parts[0] and None not in parts else 0)
    return row


def _dropped(event: QDropEvent) -> Path | None:
    """Return the file that is dragged, or None if it is not exactly one file of this computer."""
    paths = [url.toLocalFile() for url in event.mimeData().urls() if url.isLocalFile()]
    return Path(paths[0]) if len(paths) == 1 else None


def _file_name(picture: Image) -> str:
    """Return a file name made of a picture's prompt and seed."""
    record = picture.info["tiue"]
    words = re.sub(r"[\W_]+", "-", (record.prompt or "").lower())[:60].strip("-") or "picture"
    return f"{words}-{record.seed}.png"


def _save(pictures: list[Image], asked: Path) -> tuple[str, bool]:
    """Save pictures. Returns a message, and whether it is an error. Several pictures get numbers."""
    path = asked if asked.suffix else asked.with_suffix(".png")
    names = [path]
    if len(pictures) > 1:
        names = [path.with_stem(f"{path.stem}-{number}") for number in range(1, len(pictures) + 1)]
    # The dialog has asked whether to replace `asked`, and no other file.
    taken = [name.name for name in names if name != asked and name.exists()]
    if taken:
        return f"{taken[0]} exists already: choose another name", True
    try:
        for picture, name in zip(pictures, names, strict=True):
            picture.save(name)
    except OSError as error:
        return f"{path.name} could not be saved: {error.strerror or error}", True
    except TiueError as error:
        return f"{path.name} could not be saved: {error}", True
    return f"Saved as {', '.join(name.name for name in names)}", False
