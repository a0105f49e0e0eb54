"""A screen in memory (Xvfb), on which tests use a program as a person would."""

import ctypes.util
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image, ImageGrab

PATIENCE = 60  # seconds


def why_no_screen() -> str:
    """Say what is missing for a Qt program under Xvfb, or return ""."""
    missing = [name for name in ("Xvfb", "xdotool") if not shutil.which(name)]
    missing += [
        f"lib{name}" for name in ("xcb-cursor", "xcb-icccm", "xcb-keysyms") if not ctypes.util.find_library(name)
    ]
    return f"missing here: {', '.join(missing)}" if missing else ""


class Screen:
    """A running Xvfb."""

    def __init__(self, display: str) -> None:
        self.environment = {**os.environ, "DISPLAY": display, "QT_QPA_PLATFORM": "xcb"}

    def tool(self, *words: str) -> str:
        """Run xdotool. Returns what it prints."""
        command = ["xdotool", *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.strip()

    def window(self, title: str) -> str:
        """Wait for a window by a pattern of its title. Returns its number."""
        self.until(lambda: self.tool("search", "--onlyvisible", "--name", title))
        return self.tool("search", "--onlyvisible", "--name", title).split()[0]

    def picture(self) -> Image.Image:
        """Return what the screen shows."""
        return ImageGrab.grab(xdisplay=self.environment["DISPLAY"])

    def count(self, is_wanted: Callable[[int, int, int], bool]) -> int:
        """Count pixels by their color."""
        colors = self.picture().convert("RGB").getcolors(maxcolors=2**24) or []
        return sum(number for number, color in colors if is_wanted(*color))

    def until(self, happened: Callable[[], object]) -> None:
        """Wait until something has happened."""
        limit = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < limit, "nothing happened"
            time.sleep(0.02)


@contextmanager
def screen(size: str = "1000x900x24") -> Iterator[Screen]:
    """Start Xvfb on a free display."""
    read, write = os.pipe()
    server = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-screen", "0", size], pass_fds=[write])
    try:
        yield Screen(f":{os.read(read, 16).decode().strip()}")
    finally:
        server.terminate()
        server.wait()
        os.close(read)
        os.close(write)


def draw_a_heart(screen: Screen, command: list[str], **options: object) -> tuple[float, float]:
    """Use the desktop application: type a prompt, see the picture, quit.

    Args:
        screen: to run it on.
        command: that starts it.
        **options: of subprocess.Popen.

    Returns:
        Seconds from its start to its window, and to the loaded model.
    """
    begun = time.perf_counter()
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)
    try:
        screen.window("^TiUE")
        shown = time.perf_counter() - begun
        window = screen.window("^TiUE: emoji")  # The title names the bundle when it is loaded.
        loaded = time.perf_counter() - begun
        screen.tool("windowfocus", "--sync", window, "type", "a red heart")
        screen.tool("key", "Return")
        screen.until(lambda: screen.count(lambda red, green, blue: red > 200 and green < 80 and blue > 40) > 5000)
        screen.tool("key", "ctrl+q")
        status = program.wait(PATIENCE)
        printed = program.stderr.read() if program.stderr else ""
        assert status == 0 and not printed, printed
    finally:
        program.kill()
        program.communicate()
    return shown, loaded
