import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
HOSTED = ("gradio_app", "comfyui_tiue")  # They run in other programs: see test_gradio_app.py and test_comfyui.py.
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem not in HOSTED]
GUIDES = ("docs/quick-start.md", "docs/embed.md", "docs/previews.md", "README.md", "runtime/README.md")
PROGRAMS = [
    pytest.param(program, id=f"{guide}-{number}".replace("/", "-"))
    for guide in GUIDES
    for number, program in enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / guide).read_text(), re.M | re.S))
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_is_short(example, tmp_path):
    assert len(example.read_text().splitlines()) <= 25
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and done.stdout
    (picture,) = tmp_path.glob("*.png")
    with Image.open(picture) as image:
        colors = image.convert("RGB").getcolors(maxcolors=2**20)
    assert colors is not None and len(colors) > 20


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_of_the_guides_run(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "guide", "exec"), {"__name__": "__main__"})
    saved = re.findall(r"save\(f?\"", program)
    assert bool(saved) == any(tmp_path.iterdir())
