"""Shards: tar files in webdataset's layout, `key.png` and `key.json` for each picture."""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiue_runtime.bundle.replacing import replacing


class Shards:
    """Which pictures go into which tar: as many pictures into each, in their order."""

    def __init__(self, files: Sequence[str], count: int) -> None:
        size = max(-(-len(files) // count), 1)
        self.groups = [files[i : i + size] for i in range(0, len(files), size)]
        self._digits = max(len(str(len(self.groups))), 6)
        self._hashes: dict[int, dict[str, str]] = {}  # by shard, as they were when the batch began or continued
        self._number = {file: number for number, group in enumerate(self.groups) for file in group}

    def number_of(self, file: str) -> int:
        """Return the number of a picture's shard, from 0."""
        return self._number[file]

    def name_of(self, file: str) -> str:
        """Return the file name of a picture's shard."""
        return self._name(self._number[file])

    def sha256(self, directory: Path, file: str) -> str | None:
        """Return the hash of a picture in its shard, or None if it is not there. A shard is read once."""
        number = self._number[file]
        if number not in self._hashes:
            members = _members(directory / self._name(number))
            self._hashes[number] = {name: hashlib.sha256(data).hexdigest() for name, data in members}
        return self._hashes[number].get(file)

    def pack(self, directory: Path, number: int, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Write a shard from files, and from the shard as it is, then delete the files.

        `rows` has the manifest's line of each picture that was made.
        """
        there = [file for file in self.groups[number] if file in rows]
        loose = [file for file in there if (directory / file).exists()]
        if not loose:
            return
        path = directory / self._name(number)
        packed = dict(_members(path))
        with replacing(path) as target, tarfile.open(fileobj=target, mode="w") as tar:
            for file in there:
                data = (directory / file).read_bytes() if file in loose else packed[file]
                _add(tar, file, data)
                _add(tar, file.rpartition(".")[0] + ".json", json.dumps(rows[file]["record"]).encode())
        for file in loose:
            (directory / file).unlink()
            for folder in Path(file).parents[:-1]:
                with contextlib.suppress(OSError):  # It holds pictures of another shard.
                    (directory / folder).rmdir()

    def _name(self, number: int) -> str:
        return f"shard-{number:0{self._digits}}.tar"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # without times and owners: the same pictures make the same bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _members(path: Path) -> Generator[tuple[str, bytes]]:
    """Yield the files of a tar. A damaged or missing one has none."""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    yield member.name, file.read()
    except (OSError, tarfile.TarError):
        return
