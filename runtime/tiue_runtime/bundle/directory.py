"""A bundle on disk: loading and validating its directory, verifying its files, and writing bundle.json."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tiue_runtime.bundle.manifest import (
    FORMAT,
    MANIFEST,
    PORTABLE,
    REMEDY,
    TOKENIZER,
    FileInfo,
    Manifest,
    read_manifest,
)
from tiue_runtime.errors import BundleError


@dataclass(frozen=True)
class Bundle:
    """A validated bundle on disk. `Bundle.load` is the only way to make one."""

    directory: Path
    manifest: Manifest

    @classmethod
    def load(cls, directory: str | Path) -> "Bundle":
        """Read and validate a bundle directory: every field, and the presence and size of every file.

        The content of the files is not read; `verify` does that. Raises BundleError.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        if not path.is_file():
            raise BundleError(f"{directory} is not a bundle: expected a file {MANIFEST} in it, found none.")
        try:
            manifest = read_manifest(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, BundleError) as error:
            raise BundleError(f"{path}: {error}") from error
        for name, info in manifest.files.items():
            file = directory / name
            if not file.is_file():
                raise BundleError(f"{directory}: {name} is missing. {REMEDY}")
            size = file.stat().st_size
            if size != info.size:
                raise BundleError(f"{file}: expected {info.size} bytes, found {size}. {REMEDY}")
        return cls(directory, manifest)

    def graph_path(self, graph: str, variant: str = PORTABLE) -> Path:
        """The ONNX file of one of Manifest.graphs."""
        return self.directory / self.manifest.variants[variant][graph]

    @property
    def tokenizer_path(self) -> Path:
        """The file tokenizer.json."""
        return self.directory / TOKENIZER

    def verify(self) -> None:
        """Compare the sha256 of every file with bundle.json. Raises BundleError naming those that differ."""
        files = self.manifest.files.items()
        wrong = [name for name, info in files if _sha256(self.directory / name) != info.sha256]
        if wrong:
            raise BundleError(f"{self.directory}: content differs from {MANIFEST}: {', '.join(wrong)}. {REMEDY}")


def write_bundle(directory: str | Path, manifest: Manifest) -> Bundle:
    """Write bundle.json for the files now in `directory`, whose sizes and sha256 it fills in.

    Every file below `directory` becomes part of the bundle, so call this last, in the directory the bundle
    was built in. `manifest.files` is ignored.

    Returns the bundle as `Bundle.load` reads it. Raises BundleError.
    """
    directory = Path(directory)
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    files = {p.relative_to(directory).as_posix(): FileInfo(_sha256(p), p.stat().st_size) for p in paths}
    for name in {TOKENIZER, *(n for graphs in manifest.variants.values() for n in graphs.values())}:
        if name not in files:
            raise BundleError(f"{directory}: {name} is missing; write it before {MANIFEST}.")
    content: dict[str, Any] = {"format": FORMAT, **asdict(replace(manifest, files=files))}
    temporary = directory / f".{MANIFEST}.tmp"
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(directory / MANIFEST)
    return Bundle.load(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
