"""Wheels of this checkout, and environments that hold nothing but them: shared by the tests of installing."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def copy_checkout(place: Path) -> Path:
    """Copy the files that git knows, or would add. Build leftovers stay behind."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / name)
    return place


def build_wheels(checkout: Path, *packages: str) -> Path:
    """Build what `make dist` builds, with the setuptools of this environment. Returns the directory of wheels."""
    dist = checkout / "dist"
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", dist]
    done = subprocess.run([*command, *packages], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dist


def new_environment(place: Path, with_pip: bool) -> Path:
    """Make a virtual environment. Returns its directory of programs."""
    venv.create(place, with_pip=with_pip, symlinks=sys.platform != "win32")
    return place / ("Scripts" if sys.platform == "win32" else "bin")
