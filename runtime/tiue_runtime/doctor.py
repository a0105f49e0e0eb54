"""What is installed here, and whether it can make pictures."""

import platform
from importlib.metadata import version

from . import __version__
from .bundle import Bundle
from .errors import TiueError
from .find import find_bundle, installed_bundles
from .sessions import available_providers, choose_device, installed_wheels, thread_count


def examine() -> tuple[dict[str, object], list[str]]:
    """Returns rows of facts to print, and the problems found, none when everything is fine."""
    rows: dict[str, object] = {
        "tiue-runtime": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in ("numpy", "pillow", "tokenizers")),
        "onnx runtime": ", ".join(f"{n} {v}" for n, v in installed_wheels().items()) or "not installed",
        "cpu threads": thread_count(),
    }
    problems: list[str] = []
    try:
        rows["providers"] = f"{', '.join(available_providers())} (built in; not all of them need work here)"
        rows["device auto"] = choose_device("auto")
    except TiueError as error:
        problems.append(str(error))
    for name in installed_bundles():
        try:
            bundle = Bundle.load(find_bundle(name))
            rows[f"bundle {name}"] = f"{bundle.directory} ({bundle.manifest.licence})"
        except TiueError as error:
            problems.append(str(error))
    try:
        rows["default bundle"] = Bundle.load(find_bundle()).directory
    except TiueError as error:
        rows["default bundle"] = "none, see below"
        problems.append(str(error))
    return rows, list(dict.fromkeys(problems))
