"""Moving a finished directory into place: built beside its target, then exchanged in one step.

An export builds in `.tiue-export-<random>` beside its target, on the same file system. It holds a lock on the file
`.tiue-export-<random>.lock`, which has the name of the target in it. A killed export leaves both, but the lock is free.
So the next export into the same folder, under any name, says what was left and removes it.
"""

import ctypes
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from export.errors import ExportError

_PREFIX, _LOCK = ".tiue-export-", ".lock"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_HERE = -100  # AT_FDCWD
_MOUNTS = Path("/proc/self/mountinfo")  # of Linux; the fifth word of a line is a mount point


def check_target(out: Path, manifest: str, *, overwrite: bool) -> Path:
    """Check that `out` is free, an empty directory, or a bundle that may be replaced.

    Args:
        out: the directory to make. A link stands for its target.
        manifest: the file that every bundle has.
        overwrite: whether a bundle may be replaced.

    Returns:
        The absolute path, with links followed.

    Raises:
        ExportError: `out` may not be replaced.
    """
    try:
        target = out.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.13 raises OSError for a loop, earlier versions RuntimeError.
        raise ExportError(f"`out`: {out} cannot be followed, it may be a link to itself") from error
    if _is_mount_point(target):  # Nothing can be renamed to it. That would be noticed at the end of the export.
        raise ExportError(f"`out`: {out} is a mount point, which cannot be replaced; name a directory in it")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not overwrite:
        raise ExportError(f"`out`: {out} exists; choose another, or replace it with `overwrite`")
    if not (target / manifest).is_file():
        raise ExportError(f"`out`: {out} exists and is not a bundle, so it is not replaced")
    for path in (target, (target / manifest).resolve()):
        if not path.stat().st_mode & stat.S_IWUSR:  # The permission counts for root, too.
            raise ExportError(f"`out`: {path} is read-only, so it is not replaced")
    return target


@contextmanager
def building(out: Path, progress: Callable[[str], None]) -> Generator[Path]:
    """Make a directory beside `out` to build in. It is gone at the end unless `publish` moved it.

    Args:
        out: the target, absolute. Missing parents are made, and removed again if nothing was put into them.
        progress: told of everything that a killed export left and that is removed.

    Yields:
        The directory.
    """
    missing = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _remove_leftovers(out.parent, progress)
        with _reserved(out) as directory:
            try:
                directory.mkdir()
                yield directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)
    finally:
        if not out.exists():
            for parent in missing:
                with suppress(OSError):  # It was never made, or holds something else by now.
                    parent.rmdir()


def publish(built: Path, out: Path) -> None:
    """Move a finished directory to `out`. A directory that exists there is exchanged with it and then removed.

    On Linux the exchange is one step: at every moment `out` is a whole directory, the old or the new one. Elsewhere,
    and on file systems that cannot exchange, `out` is missing between two renames. If the second rename fails, the old
    directory comes back at once; if the process is killed between them, the next export brings it back.
    """
    if not out.exists():
        built.rename(out)
        return
    if not _exchange(built, out):
        aside = _aside_of(built)
        out.rename(aside)
        try:
            built.rename(out)
        except BaseException:
            aside.rename(out)
            raise
        aside.rename(built)
    shutil.rmtree(built, ignore_errors=True)  # What cannot be removed is left for the next export to name.


def _is_mount_point(path: Path) -> bool:
    """Return whether a path is a mount point. Of bind mounts of the same file system, only Linux's table knows."""
    if os.path.ismount(path):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    name = re.sub(rb"[\\ \t\n]", lambda found: b"\\%03o" % found[0][0], os.fsencode(path))
    return any(line.split()[4] == name for line in lines)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step. Returns whether the system could."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28, musl 1.2.6
    return rename is not None and rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


@contextmanager
def _reserved(out: Path) -> Generator[Path]:
    """Yield the path of a new directory beside `out`, with its lock held. The directory is not made."""
    while True:
        directory = out.with_name(f"{_PREFIX}{secrets.token_hex(4)}")
        lock = _lock_of(directory)
        try:
            with lock.open("xb") as file:
                if _take(file, lock) is False:  # Another export took it for a leftover, and removes it.
                    continue
                file.write(os.fsencode(out.name))
                file.flush()
                yield directory
                return
        finally:
            _release(directory)


def _remove_leftovers(parent: Path, progress: Callable[[str], None]) -> None:
    """Name and remove the directories of killed exports. A bundle that one had moved aside is put back."""
    for lock in parent.glob(f"{_PREFIX}*{_LOCK}"):
        directory = lock.with_name(lock.name.removesuffix(_LOCK))
        with suppress(OSError, ValueError):  # The other export ended meanwhile, or its files are not ours to remove.
            with lock.open("r+b") as file:
                if not _take(file, lock):  # Another export works there, or nobody can tell.
                    continue
                _remove_leftover(directory, os.fsdecode(file.read()), progress)
            _release(directory)


def _remove_leftover(directory: Path, name: str, progress: Callable[[str], None]) -> None:
    """Remove a killed export's directory. name: of the target."""
    out, aside = directory.with_name(name or directory.name), _aside_of(directory)
    if aside.exists() and not out.exists():
        progress(f"putting {name} back, which a killed export had moved aside")
        aside.rename(out)
    if directory.exists() or aside.exists():
        progress(f"removing {directory.name}, which a killed export left")
    for path in (directory, aside):
        shutil.rmtree(path, ignore_errors=True)


def _lock_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}{_LOCK}")


def _aside_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.old")


def _release(directory: Path) -> None:
    """Remove a lock file, unless something of its directory is still there, which the next export must find."""
    if not directory.exists() and not _aside_of(directory).exists():
        _lock_of(directory).unlink(missing_ok=True)


def _take(file: IO[Any], lock: Path) -> bool | None:
    """Lock an open lock file until it is closed.

    Returns:
        True if the lock is ours; False if another process has it or has removed the file; None if the file system has
        no locks.
    """
    locked = _try_lock(file.fileno())
    if not locked:
        return locked
    try:
        return lock.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool | None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool | None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True
