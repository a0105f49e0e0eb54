"""Writing whole files: under another name first, then renamed."""

import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


@contextmanager
def replacing(path: Path, overwrite: bool = True) -> Generator[IO[bytes]]:
    """Open a new file for writing. It replaces `path` at the end of the `with` block.

    Without `overwrite`, `path` must be a new name. Of several processes that write it at once, one succeeds.

    If the block raises, the new file is removed and `path` stays unchanged. If `path` is a link, its target is
    replaced. A read-only file is not replaced.

    Raises:
        OSError: `path` cannot be written. PermissionError is a subclass, and so is FileExistsError.
    """
    target = Path(os.path.realpath(path))  # unlike Path.resolve, also of a link to itself
    mode = _mode(target) if overwrite else None
    temporary = _new_name(target.parent)
    try:  # The file is made in this block: a signal at any moment leaves no file behind.
        with os.fdopen(os.open(temporary, _FLAGS, 0o666), "wb") as file:
            yield file
        if mode is not None:
            temporary.chmod(mode)
        if overwrite:
            temporary.replace(target)
        else:
            _claim(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _claim(temporary: Path, target: Path) -> None:
    """Rename a finished file. Raises FileExistsError if its new name is taken."""
    if os.name == "nt":
        temporary.rename(target)  # Only Windows refuses a name that exists.
        return
    try:
        os.link(temporary, target)  # The caller removes the other name.
    except FileExistsError:
        raise
    except OSError:  # Some file systems have no hard links. There, an empty file holds the name for an instant.
        os.close(os.open(target, _FLAGS, 0o666))
        temporary.replace(target)


def check_writable(path: Path) -> None:
    """Raise OSError unless `replacing` can write `path`. Tests the folder by making a file in it."""
    target = Path(os.path.realpath(path))  # unlike Path.resolve, also of a link to itself
    _mode(target)
    temporary = _new_name(target.parent)
    try:
        os.close(os.open(temporary, _FLAGS, 0o666))
    finally:
        temporary.unlink(missing_ok=True)


def _mode(target: Path) -> int | None:
    """Return the permissions of a file that may be replaced, or None if there is no file."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise PermissionError(f"{target} is not a regular file")
    # Administrators may write any file, so check the permission bits as well.
    if not (mode & 0o222 and os.access(target, os.W_OK)):
        raise PermissionError(f"{target} is read-only")
    return stat.S_IMODE(mode)


def _new_name(folder: Path) -> Path:
    """Return a short random name that no file has."""
    while True:
        temporary = folder / f".{secrets.token_hex(8)}.tmp"
        if not os.path.lexists(temporary):
            return temporary
