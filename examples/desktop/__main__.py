"""The desktop application: python -m examples.desktop."""

import argparse
import sys

from PySide6.QtWidgets import QApplication

from examples.desktop.artist import Artist
from examples.desktop.theme import dress
from examples.desktop.window import Window


def main(argv: list[str] | None = None) -> int:
    """Show the window until the user closes it."""
    parser = argparse.ArgumentParser(prog="tiue-desktop", description="Draw pictures of prompts in a window.")
    parser.add_argument("--bundle", help="a bundle's directory or name (default: TIUE_BUNDLE, else emoji)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    given, for_qt = parser.parse_known_args(argv)
    application = QApplication([sys.argv[0], *for_qt])
    dress(application)
    artist = Artist(given.bundle, given.device)
    window = Window(artist)
    window.resize(760, 780)
    window.show()
    status = application.exec()
    artist.join()
    return status


if __name__ == "__main__":
    sys.exit(main())
