"""Pulled bundles: where they lie in the user's cache, and which name stands for which directory.

    TIUE_CACHE/bundles/
        names/OWNER%2FNAME.json     one small file per name: its source and its content
        contents/HASH/              a whole bundle; HASH is of its bundle.json and signature
        partial/KEY/                a download that has not finished

A bundle exists from the moment at which its file in `names` is renamed into place. Nothing else makes one.
`tiue_runtime.hub` writes these files, this module reads them.
"""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from tiue_runtime.bundle.directory import read_limited
from tiue_runtime.bundle.fields import parse_json
from tiue_runtime.errors import BundleError, shorten

CACHE_VARIABLE = "TIUE_CACHE"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w.-]+(/[\w.-]+)*)?", re.ASCII)
_LONGEST = 200  # characters of a quoted name, so that ".json" and a temporary ending fit into 255
_RECORD_LIMIT = 64 * 2**10  # bytes


@dataclass(frozen=True)
class Pulled:
    """The record of a pulled bundle."""

    name: str
    source: str  # OWNER/NAME[@revision], a URL or a directory
    commit: str  # of the Hub, else ""
    content: str  # 64 hexadecimal digits: the name of the directory in `contents`

    @property
    def directory(self) -> Path:
        """The bundle's directory. It may be missing if another process removed it just now."""
        return store() / "contents" / self.content

    def to_json(self) -> bytes:
        """Return the bytes of the record's file."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def cache_root() -> Path:
    """Return the directory of the environment variable TIUE_CACHE, else `tiue` in the user's cache directory.

    Raises:
        FileNotFoundError: the user has no home directory.
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "tiue" / "cache"
        if sys.platform == "darwin":
            return Path.home() / "Library/Caches/tiue"
        given = os.environ.get("XDG_CACHE_HOME", "")  # XDG ignores relative paths.
        return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "tiue"
    except RuntimeError as error:
        raise FileNotFoundError(f"this user has no home directory: set {CACHE_VARIABLE} to a directory") from error


def store() -> Path:
    """Return the directory of pulled bundles. It may not exist. Raises FileNotFoundError as `cache_root`."""
    return cache_root() / "bundles"


def check_name(name: str) -> str:
    """Return a name that a pulled bundle may have. Raises BundleError."""
    if not NAME.fullmatch(name) or len(quote(name, safe="")) > _LONGEST or ".." in name:
        raise BundleError(
            "name: expected NAME or OWNER/NAME, with letters, digits, '-', '_' and '.', "
            f"of at most {_LONGEST} characters, got {shorten(name)}"
        )
    return name


def record_path(name: str) -> Path:
    """Return the file of a name's record."""
    return store() / "names" / f"{quote(check_name(name), safe='')}.json"


def find_pulled(name: str) -> Pulled | None:
    """Return the record of a pulled bundle, or None if there is none of this name."""
    try:
        record = read_record(record_path(name))
    except (BundleError, OSError):
        return None
    return record if record and record.name == name else None


def pulled_bundles() -> dict[str, Pulled]:
    """Return the records of all pulled bundles by name. A damaged record stands for no bundle."""
    try:
        records = [read_record(path) for path in sorted((store() / "names").glob("[!.]*.json"))]
    except OSError:
        return {}
    return {record.name: record for record in records if record}


def read_record(path: Path) -> Pulled | None:
    """Read a record. Returns None if there is no file, or if it is damaged."""
    try:
        content: Any = parse_json(read_limited(path, _RECORD_LIMIT))
        record = Pulled(**{key: content[key] for key in ("name", "source", "commit", "content")})
    except (BundleError, TypeError, KeyError):
        return None
    if not all(isinstance(value, str) for value in cast(dict[str, object], asdict(record)).values()):
        return None
    # The content becomes part of a path, so nothing but a hash is accepted.
    return record if re.fullmatch("[0-9a-f]{64}", record.content) and NAME.fullmatch(record.name) else None
