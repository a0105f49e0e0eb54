"""A bundle on disk: loading and validating its directory, verifying its files, and writing bundle.json."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tiue_runtime.bundle.external_data import external_data
from tiue_runtime.bundle.manifest import (
    FORMAT,
    MANIFEST,
    MANIFEST_LIMIT,
    PORTABLE,
    REMEDY,
    TOKENIZER,
    FileInfo,
    Manifest,
    read_manifest,
)
from tiue_runtime.bundle.replacing import replacing
from tiue_runtime.errors import BundleError, clip, shorten

SIGNATURE = "model.sig"  # OpenSSF's name for the signature of a model. bundle.json cannot list it: it is signed, too.

Stamp = tuple[int, int, int]
"""The size, modification time and inode of a file. A replaced or changed file has another stamp."""


@dataclass(frozen=True)
class Bundle:
    """A validated bundle on disk. `Bundle.load` is the only way to make one."""

    directory: Path
    manifest: Manifest
    stamps: Mapping[str, Stamp] = field(compare=False, repr=False)  # of each file, when the bundle was loaded
    sha256: str = field(compare=False, repr=False)  # of bundle.json, which names the hashes of all other files

    @classmethod
    def load(cls, directory: str | Path) -> "Bundle":
        """Read and validate a bundle directory: every field, and the presence and size of every file.

        The content of the files is not read; `verify` does that. Links are followed.

        Raises:
            BundleError: the directory is not a bundle, or the bundle is incomplete or damaged.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        if not os.path.exists(path):  # noqa: PTH110 (unlike Path.exists, it raises nothing for a name that is too long)
            raise BundleError(
                f"{clip(str(directory), 300)} is not a bundle: expected a file {MANIFEST} in it, found none."
            )
        try:
            content = read_limited(path, MANIFEST_LIMIT)
            manifest = read_manifest(content)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error
        stamps: dict[str, Stamp] = {}
        for name, info in manifest.files.items():
            size, *_ = stamps[name] = _stamp(directory, name)
            if size != info.size:
                raise BundleError(f"{directory / name}: expected {info.size} bytes, found {size}. {REMEDY}")
        return cls(directory, manifest, stamps, hashlib.sha256(content).hexdigest())

    def graph_path(self, graph: str, variant: str = PORTABLE) -> Path:
        """Return the ONNX file of one of Manifest.graphs."""
        return self.directory / self.manifest.variants[variant][graph]

    @property
    def tokenizer_path(self) -> Path:
        """The file tokenizer.json."""
        return self.directory / TOKENIZER

    def check_graph(self, graph: str, variant: str = PORTABLE) -> None:
        """Check the files of one graph before ONNX Runtime opens them.

        Raises:
            BundleError: the graph names external data that bundle.json does not list, or one of its files changed
                since the bundle was loaded.
        """
        name = self.manifest.variants[variant][graph]
        self._check_unchanged(name)
        for data in self._external_data(name):
            self._check_unchanged(data)

    def verify(self) -> None:
        """Compare every file with bundle.json: its sha256, and the external data that graphs name.

        Raises:
            BundleError: files differ (the message names them), or a graph names data that bundle.json does not list.
        """
        files = self.manifest.files.items()
        wrong = [name for name, info in files if _sha256(self.directory, name) != info.sha256]
        if wrong:
            names = clip(", ".join(wrong))
            raise BundleError(f"{self.directory}: content differs from {MANIFEST}: {names}. {REMEDY}")
        for name in sorted({name for graphs in self.manifest.variants.values() for name in graphs.values()}):
            self._external_data(name)

    def _check_unchanged(self, name: str) -> None:
        if _stamp(self.directory, name) != self.stamps[name]:
            raise BundleError(f"{self.directory / name} changed on disk since the bundle was loaded: load it again")

    def _external_data(self, name: str) -> list[str]:
        """Return the names of the files that hold a graph's weights."""
        folder, _, _ = name.rpartition("/")
        names = sorted(f"{folder}/{data}" if folder else data for data in external_data(self.directory / name))
        unknown = [data for data in names if data not in self.manifest.files]
        if unknown:
            raise BundleError(
                f"{self.directory / name}: expected external data among the files of {MANIFEST}, "
                f"got {shorten(unknown[0])}. {REMEDY}"
            )
        return names


def write_bundle(directory: str | Path, manifest: Manifest) -> Bundle:
    """Write bundle.json for the files in `directory`, with their sizes and sha256.

    Every file below `directory`, except hidden ones and a signature, becomes part of the bundle. Call this last.
    `manifest.files` is ignored.

    Returns:
        The bundle as `Bundle.load` reads it.

    Raises:
        BundleError: a file is missing, or a value breaks the contract.
        OSError: bundle.json cannot be written.
    """
    directory = Path(directory)
    names = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file())
    seen = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    listed = [name for name in seen if name not in (MANIFEST, SIGNATURE)]
    for name in {TOKENIZER, *(n for graphs in manifest.variants.values() for n in graphs.values())}:
        if name not in listed:
            raise BundleError(f"{directory}: {name} is missing; write it before {MANIFEST}.")
    files = {name: FileInfo(_sha256(directory, name), _stamp(directory, name)[0]) for name in listed}
    content: dict[str, Any] = {"format": FORMAT, **asdict(replace(manifest, files=files))}
    present = {key: value for key, value in content.items() if value is not None}
    data = (json.dumps(present, indent=2, ensure_ascii=False) + "\n").encode()
    read_manifest(data)  # Refuse values that could not be read back, before anything is written.
    with replacing(directory / MANIFEST) as file:
        file.write(data)
    return Bundle.load(directory)


def read_limited(path: Path, most: int) -> bytes:
    """Read a whole file of at most `most` bytes. Never wait for a pipe or a device. Raises BundleError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BundleError("expected a regular file")
            if status.st_size > most:
                raise BundleError(f"expected at most {most:,} bytes, got {status.st_size:,}")
            return file.read(status.st_size)  # read(most) would allocate `most` bytes.
    except OSError as error:
        raise BundleError(f"cannot be read: {error.strerror or error}") from error


def _stamp(directory: Path, name: str) -> Stamp:
    """Return the stamp of a regular file of a bundle. Raises BundleError."""
    try:
        status = (directory / name).stat()
    except (OSError, ValueError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else f"fails: {error}"
        raise BundleError(f"{directory}: {clip(name)} {clip(problem)}. {REMEDY}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{directory}: expected {clip(name)} to be a regular file. {REMEDY}")
    return status.st_size, status.st_mtime_ns, status.st_ino


def _sha256(directory: Path, name: str) -> str:
    _stamp(directory, name)  # It refuses pipes, which might never end.
    try:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{directory}: {clip(name)} cannot be read: {error.strerror or error}") from error
