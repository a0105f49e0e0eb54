"""Pulling: a bundle of another place becomes a bundle of the user's cache, whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tiue_runtime.bundle import MANIFEST, Bundle, FileInfo, Manifest
from tiue_runtime.bundle.directory import SIGNATURE
from tiue_runtime.bundle.find import installed_bundles
from tiue_runtime.bundle.manifest import read_manifest
from tiue_runtime.bundle.pulled import CACHE_VARIABLE, Pulled, check_name, find_pulled
from tiue_runtime.errors import BundleError, clip
from tiue_runtime.hub.pulled_files import begin, content_hash, publish, size_of, source_lock, writable
from tiue_runtime.hub.signature import Trust, check_signature
from tiue_runtime.hub.sources import Source, parse_source

OFFLINE_VARIABLES = "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"  # those that huggingface_hub reads
Report = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes of the whole bundle."""


def pull(
    source: str,
    name: str | None = None,
    *,
    trust: Trust | None = None,
    offline: bool = False,
    allow_http: bool = False,
    report: Report | None = None,
) -> Pulled:
    """Pull a bundle into the user's cache. `Pipeline.load` then finds it by its name.

    Only files that bundle.json lists are fetched, besides bundle.json and the signature. Every size and sha256 is
    checked before the bundle gets its name. A pull that was stopped continues when it is called again. Of two
    processes that pull the same source, the second waits and finds the files.

    Args:
        source: OWNER/NAME[@revision] on the Hugging Face Hub, a URL, or a directory.
        name: the name in the cache. None takes OWNER/NAME[@revision], or for other sources the name in bundle.json.
        trust: refuse the bundle unless it is signed like this.
        offline: refuse to use the network, as HF_HUB_OFFLINE=1 does. A bundle that was pulled before is returned.
        allow_http: accept URLs that begin with http:// for other hosts than this computer.
        report: called as the files arrive.

    Raises:
        BundleError: the source is no bundle, cannot be reached or is damaged; a signature is missing or wrong; the
            cache cannot be written.
    """
    found = parse_source(source, allow_http)
    if name is not None:
        check_name(name)
    if found.remote and (offline or _is_offline()):
        return _already_pulled(found, name, trust)
    with source_lock(found.text):
        data, signature = found.manifest(), found.signature()
        try:
            manifest = read_manifest(data)
        except BundleError as error:
            raise BundleError(f"{clip(found.text, 300)}: {MANIFEST}: {error}") from error
        name = _free_name(name or found.default_name() or _as_name(manifest.name), found)
        if trust and signature is None:
            raise BundleError(f"{clip(found.text, 300)} is not signed, and a signature is demanded: refused")
        record = Pulled(name, found.text, found.commit, content_hash(data, signature))
        try:
            bundle = _checked(record.directory)  # It may have been pulled before.
        except BundleError:
            bundle = None
        if bundle is None:
            staged = begin(found.text)
            _collect(found, manifest, staged, find_pulled(name), report)
            with writable():
                _write_small(staged, data, signature)
            bundle = _checked(staged)
        if trust:
            check_signature(bundle, trust)
        publish(bundle.directory, record)
        return record


def _is_offline() -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE_VARIABLES)


def _already_pulled(found: Source, name: str | None, trust: Trust | None) -> Pulled:
    """Return the bundle that was pulled from a source before. Raises BundleError."""
    wanted = name or found.default_name()
    record = find_pulled(wanted) if wanted else None
    if record is None or record.source != found.text:
        variables = " and ".join(OFFLINE_VARIABLES)
        raise BundleError(
            f"{clip(found.text, 300)} cannot be pulled offline: unset {variables}, leave `offline` out, "
            "or pull it from a directory"
        )
    bundle = _checked(record.directory)
    if trust:
        check_signature(bundle, trust)
    return record


def _as_name(text: str) -> str:
    """Turn the name in bundle.json into one that a file can have."""
    words = "-".join("".join(c if c.isascii() and (c.isalnum() or c in "_.") else " " for c in text).split())
    return check_name(words.strip("-._") or "model")


def _free_name(name: str, found: Source) -> str:
    """Return a name that no other bundle has. Raises BundleError."""
    check_name(name)
    if name in installed_bundles():
        raise BundleError(f"name: {name} is the name of an installed bundle: pull with another `name`")
    record = find_pulled(name)
    if record and record.source != found.text:
        raise BundleError(
            f"name: {name} was pulled from {clip(record.source, 200)}: remove it first, or pull with another `name`"
        )
    return name


def _collect(found: Source, manifest: Manifest, staged: Path, old: Pulled | None, report: Report | None) -> None:
    """Bring every file of a bundle into `staged`. Files that are there, or in an older version, are not fetched."""
    total = manifest.size
    with writable():
        for path in staged.rglob("*"):
            if path.is_file() and path.relative_to(staged).as_posix() not in manifest.files:
                path.unlink()  # Another version left it.
    missing = {name: info for name, info in manifest.files.items() if not _is_same(staged / name, info)}
    needed = sum(info.size for info in missing.values())
    there = total - needed
    parts = staged.with_name("parts")
    with writable():
        parts.mkdir(exist_ok=True)
        _check_space(parts, needed - size_of(parts))  # A pull that was stopped left parts there.
    for name, info in missing.items():
        begun = there

        def progress(size: int) -> None:
            nonlocal there
            there += size
            if report:
                report(min(there, total), total)

        part = parts / info.sha256
        with writable():
            if not (old and _copied(old.directory / name, part, info)):
                _fetch(found, name, info, part, progress)
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            part.replace(staged / name)
        there = begun + info.size
    if report:
        report(total, total)


def _fetch(found: Source, name: str, info: FileInfo, part: Path, progress: Callable[[int], None]) -> None:
    """Fetch a file into `part` and check it. A part that was continued and is wrong is fetched again, whole."""
    if _is_same(part, info):
        return
    for _ in range(2 if part.is_file() else 1):
        found.fetch(name, info.size, part, progress)
        if _is_same(part, info):
            return
        part.unlink()
    raise BundleError(
        f"{clip(found.text, 300)}: {clip(name)} differs from its sha256 or size in {MANIFEST}. "
        "The bundle was changed or damaged there: tell its owner"
    )


def _is_same(path: Path, info: FileInfo) -> bool:
    if not path.is_file() or path.stat().st_size != info.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == info.sha256


def _copied(old: Path, part: Path, info: FileInfo) -> bool:
    """Copy a file of the bundle's older version, if it has not changed."""
    if not _is_same(old, info):
        return False
    shutil.copyfile(old, part)
    return True


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BundleError(
            f"the bundle needs {needed / 1e6:,.0f} MB, and {folder} has {free / 1e6:,.0f} MB: "
            f"free some space, or set {CACHE_VARIABLE} to another directory"
        )


def _write_small(staged: Path, data: bytes, signature: bytes | None) -> None:
    (staged / MANIFEST).write_bytes(data)
    if signature is None:
        (staged / SIGNATURE).unlink(missing_ok=True)
    else:
        (staged / SIGNATURE).write_bytes(signature)


def _checked(directory: Path) -> Bundle:
    bundle = Bundle.load(directory)
    bundle.verify()
    return bundle
