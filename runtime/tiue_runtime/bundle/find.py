"""Finding bundles: by path, by the name that an installed package gives to its bundle, by the name of a pulled bundle.

Nothing is downloaded. A package offers its own directory as a bundle through the entry-point group
`tiue_runtime.bundles`, for example `emoji = "tiue_emoji"`. The package is located, never imported.
"""

import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from tiue_runtime.bundle import MANIFEST
from tiue_runtime.bundle.pulled import NAME, find_pulled, pulled_bundles
from tiue_runtime.errors import BundleError, clip, shorten

GROUP = "tiue_runtime.bundles"
DEFAULT_VARIABLE = "TIUE_BUNDLE"
DEFAULT_NAME = "emoji"
INSTALL_DEFAULT = "from a checkout of tiue: pip install ./runtime ./models/emoji"


def installed_bundles() -> dict[str, str]:
    """Return the names of installed bundles and their packages. If a name occurs twice, the first on sys.path wins."""
    last_first = reversed(list(entry_points(group=GROUP)))
    return dict(sorted({entry.name: entry.value for entry in last_first}.items()))


def find_bundle(name_or_path: str | Path | None = None) -> Path:
    """Return the directory of a bundle.

    Args:
        name_or_path: a directory, or the name of an installed or pulled bundle. None takes the environment variable
            TIUE_BUNDLE if it is set, else "emoji". A name is a path only if that directory holds a bundle.json. Other
            folders therefore do not hide bundles of the same name. An installed bundle hides a pulled one.

    Raises:
        BundleError: there is no such bundle.
    """
    if isinstance(name_or_path, str) and name_or_path == "":
        raise BundleError("bundle: expected a directory or the name of an installed bundle, got an empty string")
    if not isinstance(cast(object, name_or_path), str | os.PathLike | None):
        raise BundleError(
            f"bundle: expected a directory or the name of an installed bundle, got {shorten(name_or_path)}"
        )
    wanted = name_or_path or os.environ.get(DEFAULT_VARIABLE) or DEFAULT_NAME
    path = Path(wanted)
    try:
        if (path / MANIFEST).is_file():
            return path
    except (OSError, ValueError) as error:  # The name is too long, or has a null character.
        raise BundleError(f"bundle: {shorten(str(wanted))} cannot name a directory: {error.args[-1]}") from error
    text, installed = os.fspath(wanted), installed_bundles()
    if isinstance(wanted, str):
        if text in installed:
            return _package_directory(text, installed[text])
        pulled = find_pulled(text)
        if pulled:
            return pulled.directory
    if isinstance(wanted, Path) or any(separator in text for separator in (os.sep, os.altsep) if separator):
        problem = f"has no {MANIFEST}" if path.is_dir() else "is not a directory"
        hint = f" If it is a model of the Hugging Face Hub: tiue-runtime pull {text}" if NAME.fullmatch(text) else ""
        raise BundleError(f"bundle: expected a directory with a {MANIFEST}, but {path} {problem}.{hint}")
    kinds = {"installed": installed, "pulled": pulled_bundles()}
    names = "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in kinds.items())
    raise BundleError(
        f"bundle: {shorten(text)} is neither a directory with a {MANIFEST} nor an installed or pulled bundle "
        f"({clip(names, 300)}). The default bundle comes {INSTALL_DEFAULT}"
    )


def _package_directory(name: str, package: str) -> Path:
    spec = find_spec(package) if "." not in package else None  # A dotted name would import its parent.
    places = list(spec.submodule_search_locations or ()) if spec else []
    if spec and spec.origin and not places:  # Nuitka names no search locations before a package is imported.
        places = [str(Path(spec.origin).parent)]
    for place in places:
        if (Path(place) / MANIFEST).is_file():
            return Path(place)
    raise BundleError(
        f"bundle: {name!r} is installed as package {package!r}, but there is no {MANIFEST} in "
        f"{', '.join(places) or 'it: no such package'}. Reinstall that package."
    )
