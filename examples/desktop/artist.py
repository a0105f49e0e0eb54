"""The artist: one thread that loads a bundle and draws. The window hears of it by signals."""

import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image
from PySide6.QtCore import QObject, Signal
from PySide6.QtGui import QImage
from tiue_runtime import Cancelled, Pipeline, Progress, TiueError, read_record


@dataclass(frozen=True)
class Wish:
    """What the user asks for."""

    prompt: str
    count: int = 1
    seed: int | None = None  # None: a new one


class Artist(QObject):
    """Loads a bundle and draws, one wish after another. Every method returns at once.

    Args:
        bundle: as in `Pipeline.load`.
        device: as in `Pipeline.load`.
    """

    loaded = Signal(str)  # the bundle's name, and where it runs
    unavailable = Signal(str)  # why the bundle could not be loaded
    began = Signal()
    progressed = Signal(float, list)  # the finished fraction, and a QImage of each picture, or none yet
    finished = Signal(list, str)  # the pictures, and warnings, or ""
    failed = Signal(str)  # why there is no picture
    cancelled = Signal()

    def __init__(self, bundle: str | None = None, device: str = "auto") -> None:
        super().__init__()
        self._options = {"bundle": bundle, "device": device}
        self._pipeline: Pipeline | None = None
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, "artist")

    def load(self) -> None:
        """Load the bundle. `loaded` or `unavailable` follows."""
        self._thread.submit(self._load)

    def draw(self, wish: Wish) -> None:
        """Draw new pictures. `began` follows, then `progressed`, then `finished`, `failed` or `cancelled`."""
        self._submit(lambda: self._draw(wish))

    def repeat(self, path: Path) -> None:
        """Make a saved picture again. The same signals follow as after `draw`."""
        self._submit(lambda: self._repeat(path))

    def cancel(self) -> None:
        """Stop the wish that is being drawn."""
        self._stop.set()

    def close(self) -> None:
        """Stop drawing. The thread ends soon, also while a graph runs."""
        self._stop.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.shutdown(wait=True)

    def _load(self) -> None:
        try:
            self._pipeline = Pipeline.load(**self._options)
            self.loaded.emit(f"{self._pipeline.bundle.manifest.name} on {self._pipeline.device}")
        except Exception as error:
            self.unavailable.emit(_explained(error))

    def _submit(self, make: Callable[[], list[Image]]) -> None:
        self._stop.clear()
        self._thread.submit(self._work, make)

    def _work(self, make: Callable[[], list[Image]]) -> None:
        self.began.emit()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                pictures = make()
            self.finished.emit(pictures, " ".join(str(warning.message) for warning in caught))
        except Cancelled:
            self.cancelled.emit()
        except Exception as error:
            self.failed.emit(_explained(error))

    def _draw(self, wish: Wish) -> list[Image]:
        result = self._opened()(
            wish.prompt, num_images=wish.count, seed=wish.seed, callback=self._show, cancel=self._stop
        )
        return result.images

    def _repeat(self, path: Path) -> list[Image]:
        from tiue_runtime.repeating import load_for

        record, pipeline = read_record(path), self._opened()
        if record.bundle != pipeline.bundle.manifest.name or record.vae != pipeline.vae:
            pipeline = load_for(record, device=pipeline.device)  # Another installed bundle, for this picture only.
        return pipeline.repeat(record, callback=self._show, cancel=self._stop).images

    def _opened(self) -> Pipeline:
        if self._pipeline is None:
            raise TiueError("no bundle is loaded")
        return self._pipeline

    def _show(self, progress: Progress) -> None:
        """Send previews of all pictures, if the bundle has a matrix for them and a timestep has ended."""
        latents = progress.latents if self._opened().bundle.manifest.preview else None
        count = 0 if latents is None else len(latents)
        previews = [progress.preview(index) for index in range(count)]
        self.progressed.emit(progress.fraction, [to_qimage(preview) for preview in previews if preview])


def to_qimage(image: Image) -> QImage:
    """Turn a PIL image into a QImage with pixels of its own."""
    rgb = image.convert("RGB")
    return QImage(rgb.tobytes(), rgb.width, rgb.height, 3 * rgb.width, QImage.Format.Format_RGB888).copy()


def _explained(error: Exception) -> str:
    """Return a message for the user. An error that nobody expected also shows its traceback on stderr."""
    if isinstance(error, TiueError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'the file'}: {error.strerror or error}"
    traceback.print_exception(error, file=sys.stderr)
    return f"unexpected {type(error).__name__}: {error}"
