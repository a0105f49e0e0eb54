"""Measure an installation: the files of distributions and of all their requirements, in any environment."""

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@dataclass(frozen=True)
class Installed:
    """The distributions that a contender needs, as they are installed."""

    bytes: int = 0
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)  # versions of all distributions that were counted
    absent: list[str] = field(default_factory=list)  # required but not installed; `bytes` lacks them


def measure(python: str, roots: Iterable[str]) -> Installed:
    """Measure distributions and their requirements in the path of an interpreter.

    Roots that are not installed are skipped: only one of ONNX Runtime's wheels can be installed. Markers are evaluated
    for the interpreter that runs this function.

    Args:
        python: the interpreter.
        roots: requirements, for example "onnxruntime-gpu[cuda]".

    Raises:
        OSError, subprocess.CalledProcessError: `python` does not run.
    """
    code = "import json, platform, sys; print(json.dumps([platform.python_version(), sys.path[1:]]))"
    run = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    version, path = json.loads(run.stdout)
    known: dict[str, Distribution] = {}
    for distribution in distributions(path=path):
        known.setdefault(canonicalize_name(distribution.name), distribution)
    found: dict[str, Distribution] = {}
    absent: set[str] = set()
    done: set[tuple[str, str]] = set()  # (name, extra); the extra is "" for the distribution itself
    todo = [requirement for root in roots if canonicalize_name((requirement := Requirement(root)).name) in known]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in known:
            absent.add(name)
            continue
        found[name] = known[name]
        for extra in {"", *requirement.extras} - {extra for of, extra in done if of == name}:
            done.add((name, extra))
            needed = map(Requirement, known[name].requires or ())
            todo += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    versions = {name: found[name].version for name in sorted(found)}
    return Installed(sum(map(_size, found.values())), version, versions, sorted(absent))


def _size(distribution: Distribution) -> int:
    """Return the bytes of a distribution's files. For an editable one, add the packages that it points to."""
    paths = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        source = Path(unquote(urlsplit(origin["url"]).path))
        for package in (distribution.read_text("top_level.txt") or "").split():
            paths += (source / package).rglob("*")
    return sum(path.stat().st_size for path in set(paths) if path.is_file())
