"""The directory of a batch: pictures, `manifest.jsonl` with one line for each, and `batch.json`, which says of what.

A picture is first saved whole, then its line is added to the manifest. A picture without its line counts as not made.
So a batch that was killed at any moment continues with the first picture that has no line.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tiue_runtime.bundle.directory import read_limited
from tiue_runtime.bundle.fields import parse_json
from tiue_runtime.bundle.replacing import replacing
from tiue_runtime.errors import BundleError, RequestError, clip
from tiue_runtime.noise import check_seed
from tiue_runtime.tools.shards import Shards

STATE = "batch.json"
MANIFEST_LINES = "manifest.jsonl"

_LOCK = ".batch.lock"
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")  # the names that `replacing` gives
_MOST_STATE = 2**20  # bytes

Row = dict[str, Any]


class BatchDirectory:
    """A directory that this process has locked. `locked` makes one.

    Args:
        path: the directory.
        files: the names of all pictures that the batch can have, in order.
        shards: which files go into which tar; None leaves them as files.
    """

    def __init__(self, path: Path, files: Iterable[str], shards: Shards | None) -> None:
        self._path, self._shards = path, shards
        self._place = {file: i for i, file in enumerate(files)}
        self._manifest = path / MANIFEST_LINES
        self._packed = 0  # shards that need no look any more
        _remove_temporary(path)
        self._rows = self._kept_rows()

    def __contains__(self, file: str) -> bool:
        """Say whether a picture is there."""
        return file in self._rows

    def __len__(self) -> int:
        """Count the pictures that are there."""
        return len(self._rows)

    def add(self, file: str, facts: Row, write: Callable[[Path], None]) -> Row:
        """Save a picture, then its line. Returns the line's content.

        Args:
            file: one of the names.
            facts: about the picture.
            write: saves it at a path, whole or not at all.
        """
        path = self._path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        shard = {} if self._shards is None else {"shard": self._shards.name_of(file)}
        row = {"file": file, **shard, "sha256": _sha256(path.read_bytes()), **facts}
        self._append(row)
        self._rows[file] = row
        return row

    def pack_before(self, file: str) -> None:
        """Write the shards before that of a picture, if they have pictures that are not in them yet."""
        if self._shards is not None:
            self._pack_up_to(self._shards.number_of(file))

    def pack_all(self) -> None:
        """Write all shards that have pictures that are not in them yet."""
        if self._shards is not None:
            self._pack_up_to(len(self._shards.groups))

    def _pack_up_to(self, number: int) -> None:
        while self._shards is not None and self._packed < number:
            self._shards.pack(self._path, self._packed, self._rows)
            self._packed += 1

    def finish(self) -> None:
        """Bring the manifest's lines into the order of the pictures, if a line was tried again."""
        in_order = dict(sorted(self._rows.items(), key=lambda item: self._place[item[0]]))
        if list(in_order) != list(self._rows):
            self._rows = in_order
            self._write_all()

    def _append(self, row: Row) -> None:
        """Add a line by one call of the operating system, so that neither a signal nor a full disk leaves a part."""
        line = _line(row)
        descriptor = os.open(self._manifest, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            before = os.fstat(descriptor).st_size
            written = os.write(descriptor, line)
            if written < len(line):
                os.ftruncate(descriptor, before)
                raise OSError(28, os.strerror(28), str(self._manifest))
        finally:
            os.close(descriptor)

    def _write_all(self) -> None:
        with replacing(self._manifest) as file:
            file.writelines(map(_line, self._rows.values()))

    def _kept_rows(self) -> dict[str, Row]:
        """Read the manifest. Lines of pictures that are missing or changed, and half a line at its end, are dropped."""
        rows: dict[str, Row] = {}
        data = self._manifest.read_bytes() if self._manifest.exists() else b""
        for line in data.splitlines(keepends=True):
            row = _row(line)
            file = row.get("file")
            if isinstance(file, str) and file in self._place and self._is_there(file, row):
                rows[file] = row
        self._rows = rows
        if b"".join(map(_line, rows.values())) != data:
            self._write_all()
        return rows

    def _is_there(self, file: str, row: Row) -> bool:
        path = self._path / file
        with contextlib.suppress(OSError):
            if _sha256(path.read_bytes()) == row.get("sha256"):
                return True
        packed = None if self._shards is None else self._shards.sha256(self._path, file)
        return packed is not None and packed == row.get("sha256")


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Make a directory if it is missing, and hold its lock. Raises RequestError."""
    from filelock import FileLock, Timeout

    if path.exists() and not path.is_dir():
        raise RequestError(f"out: expected a directory, but {clip(str(path), 300)} is a file")
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RequestError(
            f"out: another batch is writing into {clip(str(path), 300)}; wait for its end, or choose another directory"
        ) from error
    try:
        yield
    finally:
        lock.release()


def continue_or_begin(path: Path, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state of the batch in a directory, or begin one there. The directory is locked.

    Args:
        path: the directory.
        state: of the batch that is asked for. A seed of None stands for any.

    Raises:
        RequestError: the directory holds a batch of other prompts or options, or files that are no batch.
    """
    shown = clip(str(path), 300)
    if not (path / STATE).exists():
        others = sorted(one.name for one in path.iterdir() if one.name != _LOCK and not _TEMPORARY.fullmatch(one.name))
        if others:
            raise RequestError(
                f"out: expected an empty or new directory, or one with a batch, but {shown} has {clip(others[0])}"
            )
        seed = secrets.randbits(32) if state["seed"] is None else state["seed"]
        state = {**state, "seed": seed}
        with replacing(path / STATE) as file:
            file.write((json.dumps(state, indent=2) + "\n").encode())
        return state
    try:
        found = cast(Mapping[str, Any], parse_json(read_limited(path / STATE, _MOST_STATE)))
        check_seed(found["seed"])
        differences = list(_differences(found, state))
    except (BundleError, RequestError, TypeError, KeyError, AttributeError) as error:
        raise RequestError(
            f"out: {shown} has a damaged {STATE}: {clip(str(error))}; choose another directory"
        ) from error
    if differences:
        raise RequestError(
            f"out: {shown} has a batch of another kind: {'; '.join(differences)}. Ask for the same again to continue "
            "it, or choose another directory"
        )
    return found


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Generator[str]:
    """Say in what two batches differ."""
    if found["prompts_sha256"] != wanted["prompts_sha256"]:
        yield f"the file of prompts has changed since ({found['lines']} lines then, {wanted['lines']} now)"
    if found["bundle_sha256"] != wanted["bundle_sha256"]:
        yield f"the bundle was {clip(str(found['bundle']))}, and {wanted['bundle']} is another one or has changed"
    if wanted["seed"] is not None and found["seed"] != wanted["seed"]:
        yield f"seed was {found['seed']}, now {wanted['seed']}"
    then, now = found["options"], wanted["options"]
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield f"{name} was {clip(str(then.get(name)))}, now {now.get(name)}"


def _remove_temporary(path: Path) -> None:
    """Delete what killed processes left. The lock is held, so nobody is writing."""
    for one in path.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(one.name):
            one.unlink(missing_ok=True)


def _row(line: bytes) -> Row:
    try:
        row: object = json.loads(line)
    except ValueError:
        return {}
    return cast(Row, row) if isinstance(row, dict) and line.endswith(b"\n") else {}


def _line(row: Row) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
