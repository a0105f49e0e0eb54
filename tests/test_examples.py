import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_is_short(example, tmp_path):
    assert len(example.read_text().splitlines()) <= 25
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and done.stdout
    (picture,) = tmp_path.glob("*.png")
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(maxcolors=2**20)
    assert colours is not None and len(colours) > 20
