"""How long the window keeps the user waiting: the delay of timer events, idle and while pictures are drawn.

python -m examples.desktop.latency --seconds 30
"""

import argparse
import statistics
import sys
import time

from PySide6.QtCore import QEventLoop, QObject, Qt, QTimer
from PySide6.QtWidgets import QApplication

from examples.desktop.artist import Artist
from examples.desktop.theme import dress
from examples.desktop.window import Window

_INTERVAL = 0.005  # seconds between events


class Delays(QObject):
    """Collects by how many seconds the events of a timer come too late."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._timer = QTimer(self, timerType=Qt.TimerType.PreciseTimer, interval=round(1000 * _INTERVAL))
        self._timer.timeout.connect(self._arrived)
        self._last = time.perf_counter()

    def measure(self, seconds: float) -> "Delays":
        """Run the event loop for so long."""
        loop = QEventLoop()
        QTimer.singleShot(round(1000 * seconds), loop.quit)
        self._last = time.perf_counter()
        self._timer.start()
        loop.exec()
        self._timer.stop()
        return self

    def _arrived(self) -> None:
        now = time.perf_counter()
        self.seconds.append(max(now - self._last - _INTERVAL, 0.0))
        self._last = now

    def describe(self) -> str:
        """Return median, 99th percentile and maximum in milliseconds."""
        milliseconds = [1000 * delay for delay in self.seconds]
        p99 = statistics.quantiles(milliseconds, n=100)[98]
        return (
            f"p50 {statistics.median(milliseconds):.1f} ms, p99 {p99:.1f} ms, max {max(milliseconds):.1f} ms "
            f"({len(milliseconds)} events)"
        )


def main(argv: list[str] | None = None) -> int:
    """Print the delays. Return 2 after one line on stderr if there is no model."""
    parser = argparse.ArgumentParser(description="Measure the delay of events, idle and while pictures are drawn.")
    parser.add_argument("--seconds", type=float, default=30, help="of each measurement (default 30)")
    parser.add_argument("--count", type=int, default=9, help="pictures of each wish (default 9)")
    given = parser.parse_args(argv)
    application = QApplication(sys.argv[:1])
    dress(application)
    artist = Artist()
    window = Window(artist)
    window.resize(760, 780)
    window.show()
    loaded, problems = QEventLoop(), list[str]()
    artist.loaded.connect(loaded.quit)
    artist.unavailable.connect(lambda reason: problems.append(reason))
    artist.unavailable.connect(loaded.quit)
    loaded.exec()
    if problems:
        print(f"latency: error: {problems[0]}", file=sys.stderr)
        return 2
    drawn: list[int] = []
    artist.finished.connect(lambda pictures, _: drawn.append(len(pictures)))
    print("idle:   ", Delays().measure(given.seconds).describe())
    artist.finished.connect(window.draw.click, Qt.ConnectionType.QueuedConnection)  # the next wish
    window.prompt.setText("a red heart")
    window.count.setValue(given.count)
    window.draw.click()
    print("drawing:", Delays().measure(given.seconds).describe(), f"{sum(drawn)} pictures were drawn")
    window.close()
    artist.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
