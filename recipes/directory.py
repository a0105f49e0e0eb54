"""The directories of a recipe: each belongs to one preset and one source, and its parts are whole or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluation.reference import read_json
from tiue.files import shortened, write_text


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of a recipe in preset.json of its directory, since it takes results there as its own.

    Raises:
        ValueError: the directory has results of other settings, or preset.json is damaged.
    """
    path = out / "preset.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    # Settings that only one of both has are of another version of the recipe. New ones are compared from now on.
    recorded = read_object(path)
    found, wanted = (dict(_flat(one)) for one in (recorded, settings))
    names = [name for name in wanted if name in found and found[name] != wanted[name]]
    if names:
        differences = ", ".join(f"{n} {found[n]} -> {wanted[n]}" for n in names)
        raise ValueError(f"{out} has results of other settings: {shortened(differences)}")
    if wanted.keys() - found.keys():
        write_text(path, json.dumps(recorded | dict(settings), indent=2) + "\n")


def content_hash(path: Path) -> str:
    """Identify a file, or all files of a folder with their names, by 16 hex digits."""
    hashed = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                of_file = hashlib.file_digest(opened, "sha256").hexdigest()
            hashed.update(f"{file.relative_to(path).as_posix()} {of_file}\n".encode())
    return hashed.hexdigest()[:16]


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give the path of a directory to make. When it is complete, it takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        yield made
        shutil.rmtree(path, ignore_errors=True)
        made.rename(path)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ValueError, which names the file."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """List nested settings as "distill.iterations" with their values as JSON."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value)
