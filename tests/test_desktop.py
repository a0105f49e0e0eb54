"""The desktop application: in this process without a screen, and once as a user would use it under Xvfb."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from screens import draw_a_heart, screen, why_no_screen
from tiue_runtime import Pipeline, read_record, saving

pytest.importorskip("PySide6.QtWidgets", reason="Qt or its libraries are missing", exc_type=ImportError)
from PySide6.QtCore import QEventLoop, QMimeData, QPoint, QPointF, Qt, QTimer, QUrl
from PySide6.QtGui import QDragEnterEvent, QDropEvent
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication

from examples.desktop import gallery, theme
from examples.desktop.artist import Artist
from examples.desktop.latency import Delays
from examples.desktop.window import Window

# Qt marks the constructors of these events as deprecated: programs receive them, only tests make them.
pytestmark = pytest.mark.filterwarnings("ignore:Function. 'QD:DeprecationWarning")
ROOT = Path(__file__).parents[1]
PATIENCE = 60  # seconds
SEED = "5"


@pytest.fixture(scope="module")
def application():
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    application = QApplication.instance() or QApplication([])
    theme.dress(application)
    return application


@pytest.fixture(scope="module")
def pipe():
    """Pipelines of the same bundle share its graphs, so windows open quickly while this one is there."""
    with Pipeline.load(device="cpu") as pipe:
        yield pipe


@pytest.fixture
def window(application, pipe):
    window = opened(Artist(device="cpu"))
    yield window
    window.close()
    window._artist.join()


def opened(artist):
    window = Window(artist)
    window.show()
    until(lambda: window.draw.isEnabled())
    return window


def until(happened):
    """Run the event loop until something has happened."""
    loop, timer = QEventLoop(), QTimer(interval=5)
    limit = time.monotonic() + PATIENCE
    timer.timeout.connect(lambda: loop.quit() if happened() or time.monotonic() > limit else None)
    timer.start()
    loop.exec()
    assert happened()


def draw(window, prompt="a red heart", count=1, seed=SEED):
    window.prompt.setText(prompt)
    window.count.setValue(count)
    window.seed.setText(seed)
    window.draw.click()


def idle(window):
    until(lambda: window.draw.text() == "Draw")


def notice(window):
    return "" if window._notice.isHidden() else window._notice.text()


def drop(window, *paths):
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(path)) for path in paths])
    arguments = Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    entered = QDragEnterEvent(QPoint(5, 5), *arguments)
    entered.ignore()
    window.dragEnterEvent(entered)
    if entered.isAccepted():
        window.dropEvent(QDropEvent(QPointF(5, 5), *arguments))
    return entered.isAccepted()


def shown(window):
    return window._gallery.pictures()


def test_pictures_are_those_of_the_library_and_previews_come_first(window, pipe):
    previews = []
    window._artist.progressed.connect(lambda fraction, images: previews.append((fraction, len(images))))
    draw(window, count=2)
    assert window.draw.text() == "Cancel" and not window.repeat.isEnabled()
    idle(window)
    pictures = shown(window)
    expected = pipe("a red heart", seed=5, num_images=2, memory="sequential").images  # as the window draws
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected]
    assert [fraction for fraction, _ in previews] == sorted(fraction for fraction, _ in previews)
    assert {count for _, count in previews} == {0, 2}
    assert window._gallery.count() == 2 and window._caption.text() == "2 pictures"
    window._gallery.item(1).setSelected(False)
    assert window._caption.text().startswith("a red heart, noto classic style  ·  seed 5  ·  128x128")


def test_a_picture_that_is_dropped_is_made_again(window, tmp_path):
    draw(window, "a sunflower")
    idle(window)
    (made,) = shown(window)
    made.save(tmp_path / "flower.webp")
    draw(window)
    idle(window)
    assert drop(window, tmp_path / "flower.webp")
    idle(window)
    (again,) = shown(window)
    assert again is not made and again.tobytes() == made.tobytes() and not notice(window)
    assert window._gallery.count() == 3


@pytest.mark.parametrize("kind", ["picture of another program", "text", "damaged", "absent", "folder"])
def test_a_foreign_file_is_refused_with_a_message(window, tmp_path, kind):
    path = tmp_path / "dropped.png"
    if kind == "picture of another program":
        Image.new("RGB", (8, 8)).save(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" if kind == "damaged" else b"hello")
    drop(window, path)
    idle(window)
    assert notice(window).startswith("No picture: ") and "dropped.png" in notice(window)
    draw(window)
    idle(window)
    assert len(shown(window)) == 1 and not notice(window)


def test_two_files_and_links_of_the_web_cannot_be_dropped(window, tmp_path):
    assert not drop(window, tmp_path / "a.png", tmp_path / "b.png")
    assert not drop(window)


def test_cancel_ends_the_drawing_and_shows_the_earlier_picture(window):
    draw(window)
    idle(window)
    before = shown(window)
    window._artist.progressed.connect(lambda *_: window.draw.click())
    draw(window, count=9, seed="")
    idle(window)
    assert window._caption.text() == "Cancelled." and shown(window) == before
    assert window._gallery.count() == 1


def test_escape_cancels(window):
    draw(window, count=9)
    QTest.keyClick(window.prompt, Qt.Key.Key_Escape)
    idle(window)
    assert window._caption.text() == "Cancelled."


def test_the_window_closes_at_once_while_a_picture_is_drawn(application, pipe):
    window, began = opened(Artist(device="cpu")), []
    window._artist.began.connect(lambda: began.append(True))
    draw(window, count=9)
    until(lambda: began)
    begun = time.monotonic()
    assert window.close() and time.monotonic() - begun < 0.5
    window._artist.join()
    application.processEvents()
    assert window._gallery.count() == 0 and time.monotonic() - begun < 5


def test_a_missing_bundle_is_explained_and_can_be_loaded_later(application, tmp_path):
    window = opened(Artist(str(tmp_path / "bundle")))
    assert window.draw.text() == "Try again" and "bundle" in notice(window)
    assert not window.repeat.isEnabled()
    drop(window, tmp_path / "heart.png")
    assert notice(window) == "No model is loaded yet."
    shutil.copytree(ROOT / "runtime/tests/data/tiny", tmp_path / "bundle")
    window.draw.click()
    until(lambda: window.draw.text() == "Draw")
    draw(window)  # This bundle has no matrix for previews.
    idle(window)
    assert len(shown(window)) == 1
    window.close()
    window._artist.join()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_full_disk_is_explained(window, tmp_path, monkeypatch, code):
    draw(window)
    idle(window)

    def fail(path, *_):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(saving, "replacing", fail)
    window.save_pictures(shown(window), tmp_path / "heart.png")
    until(lambda: notice(window))
    assert notice(window) == f"Heart.png could not be saved: {os.strerror(code)}"
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    window.save_pictures(shown(window), tmp_path / "heart.png")
    until(lambda: notice(window) == "Saved as heart.png")
    assert read_record(tmp_path / "heart.png").seed == 5


def test_a_name_without_an_ending_replaces_nothing(window, tmp_path):
    (tmp_path / "heart.png").write_text("an earlier picture")
    draw(window)
    idle(window)
    window.save_pictures(shown(window), tmp_path / "heart")  # The dialog has asked about this name.
    until(lambda: notice(window))
    assert notice(window) == "Heart.png exists already: choose another name"
    assert (tmp_path / "heart.png").read_text() == "an earlier picture"


def test_several_pictures_are_saved_with_numbers_and_replace_nothing(window, tmp_path):
    draw(window, count=3)
    idle(window)
    window.save_pictures(shown(window), tmp_path / "heart")
    until(lambda: "heart-3.png" in notice(window))
    seeds = [read_record(tmp_path / f"heart-{number}.png").seed for number in (1, 2, 3)]
    assert seeds == [5, 6, 7]
    window.save_pictures(shown(window), tmp_path / "heart.png")
    until(lambda: "exists already" in notice(window))
    window.save_pictures(shown(window), tmp_path / "heart.gif")
    until(lambda: "could not be saved" in notice(window))
    assert len(list(tmp_path.iterdir())) == 3


def test_what_cannot_be_drawn_is_explained(window):
    draw(window, prompt="  ")
    assert "a red heart" in notice(window)
    draw(window, seed=str(2**64 - 1))
    assert notice(window).startswith("The seed is a number from 0 to ")
    draw(window, count=9)
    drop(window, ROOT / "docs/emoji-grid.png")
    assert notice(window).startswith("Wait until this drawing is done")
    window.draw.click()
    idle(window)


def test_an_error_that_nobody_expected_leaves_a_window_that_works(window, monkeypatch, capsys):
    monkeypatch.setattr(window._artist, "_pipeline", lambda *_, **__: 1 // 0)
    draw(window)
    idle(window)
    assert "unexpected ZeroDivisionError" in notice(window)
    assert "Traceback" in capsys.readouterr().err


def test_the_gallery_forgets_the_oldest_pictures(window, pipe, monkeypatch):
    monkeypatch.setattr(gallery, "MOST", 4)
    for seed in ("1", "4"):
        draw(window, count=3, seed=seed)
        idle(window)
    assert window._gallery.count() == 4
    window._gallery.selectAll()
    assert [picture.record.seed for picture in shown(window)] == [4, 5, 6, 1]


def test_the_event_loop_answers_while_pictures_are_drawn(window):
    """The bound is loose, because this machine may be busy. docs/desktop.md has the measured delays."""
    window._artist.finished.connect(window.draw.click, Qt.ConnectionType.QueuedConnection)
    draw(window, count=9)
    delays = Delays().measure(1).seconds
    window._artist.finished.disconnect(window.draw.click)
    window.draw.click()
    idle(window)
    assert len(delays) > 50 and sorted(delays)[len(delays) // 2] < 0.05


def test_delays_without_a_model_are_not_measured(tmp_path):
    variables = {"QT_QPA_PLATFORM": "offscreen", "TIUE_BUNDLE": str(tmp_path / "bundle")}
    command = [sys.executable, "-m", "examples.desktop.latency", "--seconds", "1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("latency: error: ")


@pytest.mark.skipif(bool(why_no_screen()), reason=why_no_screen() or "-")
def test_a_user_draws_under_xvfb():
    command = [sys.executable, "-m", "examples.desktop", "--device", "cpu", "--bundle", "emoji"]
    with screen() as shown:
        draw_a_heart(shown, command, cwd=ROOT, env=shown.environment)
