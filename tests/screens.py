"""A screen in memory (Xvfb), on which tests use a program as a person would."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageGrab, features

PATIENCE = 120  # seconds, for what takes two on an idle machine. A program that ends is noticed at once.


def why_no_screen() -> str:
    """Say what is missing for a Qt program under Xvfb, or return ""."""
    missing = [name for name in ("Xvfb", "xdotool", "ldd") if not shutil.which(name)]
    missing += [] if features.check("xcb") else ["Pillow's XCB"]
    qt = importlib.util.find_spec("PySide6")
    missing += [] if qt else ["PySide6"]
    if qt and qt.origin and shutil.which("ldd"):
        plugin = Path(qt.origin).parent / "Qt/plugins/platforms/libqxcb.so"
        needed = subprocess.run(["ldd", plugin], capture_output=True, text=True).stdout.splitlines()
        missing += [line.split()[0] for line in needed if line.endswith("not found")]
    return f"missing here: {', '.join(missing)}" if missing else ""


class Program:
    """A running program, and what it prints. The program ends with its context."""

    def __init__(self, command: Sequence[str | Path], **options: object) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self.name = Path(command[0]).name
        self.process = subprocess.Popen(command, stdout=self._printed, stderr=self._printed, **options)

    def printed(self) -> str:
        """Return all that the program has printed."""
        return os.pread(self._printed.fileno(), 2**20, 0).decode(errors="replace").strip()

    def __str__(self) -> str:
        status = self.process.poll()
        state = "runs" if status is None else f"has ended with status {status}"
        return f"{self.name} {state}. It printed: {self.printed() or 'nothing'}"

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # Killed, Xvfb would leave its files in /tmp.
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._printed.close()


class Screen:
    """A running Xvfb."""

    def __init__(self, display: str, server: Program) -> None:
        self.environment = {**os.environ, "DISPLAY": display, "QT_QPA_PLATFORM": "xcb"}
        self._programs = [server]

    @contextmanager
    def running(self, command: Sequence[str | Path], **options: object) -> Iterator[Program]:
        """Run a program that must not end while something is waited for.

        Args:
            command: that starts it.
            **options: of subprocess.Popen.
        """
        with Program(command, **options) as program:
            self._programs.append(program)
            try:
                yield program
            finally:
                self._programs.remove(program)

    def _xdotool(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["xdotool", *words], env=self.environment, capture_output=True, text=True)

    def tool(self, *words: str) -> None:
        """Run xdotool."""
        done = self._xdotool(*words)
        assert done.returncode == 0, f"xdotool {' '.join(words)}: {done.stderr}\n{self}"

    def windows(self, title: str) -> list[str]:
        """Return the numbers of the visible windows with a pattern of a title."""
        return self._xdotool("search", "--onlyvisible", "--name", title).stdout.split()  # fails where there is none

    def window(self, title: str) -> str:
        """Wait for a window by a pattern of its title. Returns its number."""
        found: list[str] = []
        self.until(f"window {title}", lambda: found.extend(self.windows(title)) or found)
        return found[0]

    def picture(self) -> Image.Image:
        """Return what the screen shows."""
        return ImageGrab.grab(xdisplay=self.environment["DISPLAY"])

    def count(self, is_wanted: Callable[[int, int, int], bool]) -> int:
        """Count pixels by their color."""
        colors = self.picture().convert("RGB").getcolors(maxcolors=2**24) or []
        return sum(number for number, color in colors if is_wanted(*color))

    def until(self, what: str, happened: Callable[[], object]) -> None:
        """Wait until something has happened. Fails at once when a program has ended."""
        limit = time.monotonic() + PATIENCE
        while not happened():
            assert all(program.process.poll() is None for program in self._programs), f"no {what}.\n{self}"
            assert time.monotonic() < limit, f"no {what} in {PATIENCE} seconds.\n{self}"
            time.sleep(0.02)

    def __str__(self) -> str:
        titles = [self._xdotool("getwindowname", number).stdout.strip() for number in self.windows(".")]
        return "\n".join([*map(str, self._programs), f"Visible windows: {titles or 'none'}"])


@contextmanager
def screen(size: str = "1000x900x24") -> Iterator[Screen]:
    """Start Xvfb on a free display.

    Without -noreset, Xvfb starts again when its last client leaves. It refuses the clients that come meanwhile.
    """
    read, write = os.pipe()
    with os.fdopen(read, "rb") as displays:
        try:
            server = Program(["Xvfb", "-noreset", "-displayfd", str(write), "-screen", "0", size], pass_fds=[write])
        finally:
            os.close(write)
        with server:
            display = displays.readline().decode().strip()
            assert display, f"no screen. {server}"
            yield Screen(f":{display}", server)


def draw_a_heart(screen: Screen, command: Sequence[str | Path], **options: object) -> tuple[float, float]:
    """Use the desktop application: type a prompt, see the picture, quit.

    Args:
        screen: to run it on.
        command: that starts it.
        **options: of subprocess.Popen.

    Returns:
        Seconds from its start to its window, and to the loaded model.
    """

    def is_heart(red: int, green: int, blue: int) -> bool:
        return red > 200 and green < 80 and blue > 40

    begun = time.perf_counter()
    with screen.running(command, **options) as program:
        screen.window("^TiUE")
        shown = time.perf_counter() - begun
        window = screen.window("^TiUE: emoji")  # The title names the bundle when it is loaded.
        loaded = time.perf_counter() - begun
        screen.tool("windowfocus", "--sync", window, "type", "a red heart")
        screen.tool("key", "Return")
        screen.until("red heart", lambda: screen.count(is_heart) > 5000)
        screen.tool("key", "ctrl+q")
        status = program.process.wait(PATIENCE)
        assert status == 0 and not program.printed(), program
    return shown, loaded
