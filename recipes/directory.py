"""A directory of a recipe belongs to one preset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tiue.files import shortened, write_text


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of a recipe in preset.json of its directory, since it takes results there as its own.

    Raises:
        ValueError: the directory has results of other settings.
    """
    path = out / "preset.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    # Settings that only one of both has are of another version of the recipe. They cannot be compared.
    found, wanted = (dict(_flat(one)) for one in (json.loads(path.read_text(encoding="utf-8")), settings))
    names = [name for name in wanted if name in found and found[name] != wanted[name]]
    if names:
        differences = ", ".join(f"{n} {found[n]} -> {wanted[n]}" for n in names)
        raise ValueError(f"{out} has results of other settings: {shortened(differences)}")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """List nested settings as "distill.iterations" with their values as JSON."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value)
