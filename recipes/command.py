"""What the commands of the recipes share: a directory belongs to one preset, and errors are one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiue.distill.loop import DivergedError, StoppedError
from tiue.files import one_line, shortened, write_text


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of a recipe in preset.json of its directory, since it takes results there as its own.

    Raises:
        ValueError: the directory has results of other settings.
    """
    path, wanted = out / "preset.json", json.loads(json.dumps(settings))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
        if names:
            differences = ", ".join(f"{n} {found.get(n)!r} -> {wanted.get(n)!r}" for n in sorted(names))
            raise ValueError(f"{out} has results of other settings: {shortened(differences)}")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(wanted, indent=2) + "\n")


def status_of(program: str, work: Callable[[], None]) -> int:
    """Do the work of a command. On failure, print the reason as one line on stderr.

    Returns:
        0; 1 if a training diverged; 2 if the work cannot be done; 128 plus the number of the signal that stopped it.
    """
    try:
        work()
    except StoppedError as error:
        return _failed(program, error, 128 + error.signal)
    except DivergedError as error:
        return _failed(program, error, 1)
    except (ValueError, OSError) as error:
        return _failed(program, error, 2)
    return 0


def _failed(program: str, error: Exception, status: int) -> int:
    print(f"{program}: {one_line(error)}", file=sys.stderr)
    return status
