"""Build the documentation site: python -m website."""

import shutil
import subprocess
import sys
from pathlib import Path

from website.check import problems
from website.pages import gather, navigation

ROOT = Path(__file__).parents[1]
STYLE = "website/site.css"


def main() -> int:
    """Build the site into build/site. Return 1 if it has a dead link or would load something from another host."""
    pages = ROOT / "build" / "pages"
    try:
        gather(ROOT, navigation(ROOT), pages)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    (pages / "website").mkdir(exist_ok=True)  # It is there if a document links into it.
    shutil.copyfile(ROOT / STYLE, pages / STYLE)
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT)
    if built.returncode:
        return 1
    found = list(problems(ROOT / "build" / "site"))
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
