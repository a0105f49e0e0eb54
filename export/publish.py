"""Putting a finished directory in its place: built beside it, then exchanged in one step.

An export builds in `.tiue-<hash of the name>-<random>` beside its target, on the same file system, and holds a lock
beside that. A killed export leaves both; the lock is then free, so that the next export to the same target removes
them and says so. The names have 32 characters whatever the target's name is.
"""

import ctypes
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from export.errors import ExportError

_LOCK = ".lock"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_HERE = -100  # AT_FDCWD


def check_target(out: Path, manifest: str, *, overwrite: bool) -> None:
    """Raise ExportError unless `out` is free, an empty directory, or a bundle that may be replaced.

    Args:
        out: the directory to make. A link stands for its target.
        manifest: the file that a bundle has.
        overwrite: whether a bundle may be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ExportError(f"`out`: {out} exists; choose another, or replace it with `overwrite`")
    if not (out / manifest).is_file():
        raise ExportError(f"`out`: {out} exists and is not a bundle, so it is not replaced")
    for path in (out.resolve(), (out / manifest).resolve()):
        if not path.stat().st_mode & stat.S_IWUSR:  # The permission counts for root, too.
            raise ExportError(f"`out`: {path} is read-only, so it is not replaced")


@contextmanager
def building(out: Path, progress: Callable[[str], None]) -> Generator[Path]:
    """Make a directory beside `out` to build in. It is gone at the end unless `publish` moved it.

    Args:
        out: the target, absolute. Missing parents are made, and removed again if nothing was put into them.
        progress: told of every directory of a killed export that is removed.
    """
    missing = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".tiue-{hashlib.sha256(out.name.encode()).hexdigest()[:16]}-"
    try:
        _remove_leftovers(out, prefix, progress)
        directory = out.parent / f"{prefix}{secrets.token_hex(4)}"
        lock = directory.with_name(directory.name + _LOCK)
        with lock.open("xb") as file:
            try:
                _try_lock(file.fileno())
                directory.mkdir()
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
                if sys.platform != "win32":  # Windows deletes no open file.
                    lock.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    finally:
        if not out.exists():
            for parent in missing:
                with suppress(OSError):  # It was never made, or holds something else by now.
                    parent.rmdir()


def publish(built: Path, out: Path) -> None:
    """Move a finished directory to `out`. A directory that is there is exchanged with it and then removed.

    On Linux the exchange is one step: at every moment `out` is a whole directory, the old or the new one. Elsewhere,
    and on file systems that cannot exchange, `out` is missing between two renames, and comes back if the second fails.
    """
    if not out.exists():
        built.rename(out)
        return
    if not _exchange(built, out):
        aside = built.with_name(f"{built.name}.old")
        out.rename(aside)
        try:
            built.rename(out)
        except BaseException:
            aside.rename(out)
            raise
        aside.rename(built)
    shutil.rmtree(built)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step. Returns whether the system could."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28, musl 1.2.6
    return rename is not None and rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


def _remove_leftovers(out: Path, prefix: str, progress: Callable[[str], None]) -> None:
    for lock in out.parent.glob(f"{prefix}*{_LOCK}"):
        directory = lock.with_name(lock.name.removesuffix(_LOCK))
        try:
            with lock.open("r+b") as file:
                if not _try_lock(file.fileno()):
                    continue  # Another export is at work there.
        except OSError:  # It ended meanwhile.
            continue
        old = directory.with_name(f"{directory.name}.old")
        if old.exists() and not out.exists():  # It was killed between the two renames of `publish`.
            progress(f"putting {out.name} back, which a killed export had moved aside")
            old.rename(out)
        progress(f"removing {directory.name}, which a killed export left")
        for path in (directory, old):
            shutil.rmtree(path, ignore_errors=True)
        lock.unlink(missing_ok=True)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        """Lock an open file until it is closed. Returns whether nobody else has locked it."""
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        """Lock an open file until it is closed. Returns whether nobody else has locked it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
