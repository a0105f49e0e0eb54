"""What PyInstaller needs to freeze an application: the entry point `pyinstaller40` leads here."""

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """Return the directory of the hooks."""
    return [str(Path(__file__).parent)]
