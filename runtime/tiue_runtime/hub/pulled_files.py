"""The writing side of the cache of bundles: locks, publishing, removing.

Two kinds of locks exist. The lock of a source is held for a whole download. The lock of the store is held for an
instant, while names and contents change. The operating system frees both when a process dies.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tiue_runtime.bundle.pulled import (
    CACHE_VARIABLE,
    Pulled,
    find_pulled,
    pulled_bundles,
    read_record,
    record_path,
    store,
)
from tiue_runtime.bundle.replacing import replacing
from tiue_runtime.errors import BundleError, clip

_SOURCE = "source"  # the file in a partial download that names its source


def content_hash(manifest: bytes, signature: bytes | None) -> str:
    """Return the hash that names a content: of bundle.json, which holds the hash of every file, and the signature."""
    return hashlib.sha256(hashlib.sha256(manifest).digest() + (signature or b"")).hexdigest()


def partial_directory(source: str) -> Path:
    """Return the directory in which a source's files are collected."""
    return store() / "partial" / hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@contextmanager
def source_lock(source: str, wait: bool = True) -> Generator[bool]:
    """Hold the lock of a source's download. Yields False if another process has it and `wait` is False."""
    with _locked(partial_directory(source).with_suffix(".lock"), wait) as held:
        yield held


@contextmanager
def _locked(path: Path, wait: bool = True) -> Generator[bool]:
    from filelock import FileLock, Timeout

    with writable():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            lock = None
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def writable() -> Generator[None]:
    """Turn an OSError of the cache directory into a BundleError with the remedy."""
    try:
        yield
    except OSError as error:
        reason = clip(error.strerror or str(error))
        place = f" ({clip(str(error.filename), 300)})" if error.filename else ""
        raise BundleError(
            f"the cache of bundles cannot be written: {reason}{place}. "
            f"Free some space, or set {CACHE_VARIABLE} to another directory, then pull again"
        ) from error


def begin(source: str) -> Path:
    """Make the directory for a source's download, and note the source in it. Returns the place of the bundle."""
    partial = partial_directory(source)
    with writable():
        (partial / "bundle").mkdir(parents=True, exist_ok=True)
        with replacing(partial / _SOURCE) as file:
            file.write(source.encode("utf-8", "surrogatepass"))
    return partial / "bundle"


def publish(directory: Path, record: Pulled) -> None:
    """Give a complete bundle its name, by renames. A bundle that had the name loses it, and its files are deleted.

    Args:
        directory: of the bundle: that of an unfinished download, or that of the record.
        record: the new record.

    Raises:
        BundleError: the cache cannot be written, or the record's directory was removed meanwhile.
    """
    staged = directory != record.directory
    with writable():
        if staged:
            _to_disk(directory)
        with _locked(store() / "store.lock"):
            if staged:
                record.directory.parent.mkdir(parents=True, exist_ok=True)
                _discard(record.directory)
                directory.rename(record.directory)
            elif not directory.is_dir():
                raise BundleError(f"{clip(record.name)} was removed by another process meanwhile: pull again")
            path = record_path(record.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(record.to_json())
            _sweep()
    shutil.rmtree(partial_directory(record.source), ignore_errors=True)


def remove(name: str) -> int:
    """Delete a pulled bundle, and an unfinished download of the same name or source.

    A pipeline that has loaded the bundle keeps its graphs. With memory="low" its next call fails with a BundleError.

    Returns:
        The bytes that were freed.

    Raises:
        BundleError: there is neither, or the cache cannot be written.
    """
    freed = 0
    with writable(), _locked(store() / "store.lock"):
        record = find_pulled(name)
        if record:
            size = size_of(record.directory)
            record_path(name).unlink(missing_ok=True)
            _sweep()
            freed += 0 if record.directory.exists() else size  # It stays if it has another name, too.
    for source in {name, record.source if record else name}:
        partial = partial_directory(source)
        if partial.is_dir():
            with source_lock(source, wait=False) as held:
                if held:
                    freed += size_of(partial)
                    shutil.rmtree(partial, ignore_errors=True)
                elif not record:
                    raise BundleError(f"{clip(name)} is being pulled by another process: stop that one first")
    if not record and not freed:
        known = ", ".join((*pulled_bundles(), *unfinished())) or "none"
        raise BundleError(
            f"there is no pulled bundle {clip(name)!r} (pulled: {clip(known, 300)}). pip removes installed ones"
        )
    return freed


def unfinished() -> dict[str, int]:
    """Return the sources of downloads that have not finished, and the bytes that they hold."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for path in sorted((store() / "partial").glob(f"*/{_SOURCE}")):
            found[path.read_text(encoding="utf-8", errors="replace")] = size_of(path.parent)
    return found


def size_of(directory: Path) -> int:
    """Return the bytes of the files below a directory. Files that vanish meanwhile count as empty."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(folder) / name).lstat().st_size
    return total


def _sweep() -> None:
    """Delete contents without a name, and what an earlier deletion left. Call it with the store's lock."""
    names, contents = store() / "names", store() / "contents"
    if not contents.is_dir():
        return
    for path in names.glob(".*.tmp"):
        path.unlink(missing_ok=True)  # Written with this lock, by a process that was killed.
    records = [read_record(path) for path in names.iterdir()]
    if None not in records:  # A record that cannot be read may name any content.
        named = {record.content for record in records if record}
        for directory in contents.iterdir():
            if directory.name not in named:
                _discard(directory)
    for directory in (store() / "trash").glob("*"):
        shutil.rmtree(directory, ignore_errors=True)  # Windows keeps files that are in use: the next sweep tries again.


def _discard(directory: Path) -> None:
    """Move a directory out of the way by one rename, so that nobody sees a part of it, then delete it."""
    if directory.exists():
        trash = store() / "trash" / secrets.token_hex(8)
        trash.parent.mkdir(exist_ok=True)
        with contextlib.suppress(PermissionError):  # Windows refuses while a file is in use.
            directory.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _to_disk(directory: Path) -> None:
    """Wait until the files are on the disk, so that a power failure after the rename cannot empty them."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
