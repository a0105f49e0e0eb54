"""docs/notebooks.md in a real kernel of Jupyter, and how such a kernel interrupts a request."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

PAGE = Path(__file__).parents[1] / "docs/notebooks.md"
CELLS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def run(tmp_path):
    """Return a function that runs cells in a new kernel. It returns each cell's outputs."""

    def run(*sources):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
        nbformat.validate(notebook)
        return [cell.outputs for cell in notebook.cells]

    return run


def png_of(output):
    file = base64.b64decode(output["data"]["image/png"])
    return Image.open(io.BytesIO(file)).convert("RGB")


def test_the_page_shows_what_it_says(run):
    sheet, bar, previews = run(*CELLS)
    (shown,) = sheet
    width, height = png_of(shown).size
    assert width > 1.9 * height
    styles = ("fluent flat", "twemoji", "emojione", "fluent")  # of the seeds 1 to 4
    hearts = "; ".join(f"a red heart, {style} style" for style in styles)
    assert shown["metadata"]["image/png"]["alt"].startswith(f"{hearts}; a sunflower, ")
    assert shown["data"]["text/plain"].startswith("<Result: 8 pictures, seeds 1 to 8, ")
    widget, nine = bar
    assert "application/vnd.jupyter.widget-view+json" in widget["data"]
    assert png_of(nine).width == png_of(nine).height
    (penguin,) = previews  # The handle replaces each preview by the next, and the last by the result.
    assert (
        "<Result: 1 picture, seed 1, " in penguin["data"]["text/plain"] and len(png_of(penguin).getcolors(2**20)) > 20
    )


def test_a_bar_without_widgets_is_a_line(run):
    text = "import sys, warnings; sys.modules['ipywidgets'] = None; warnings.simplefilter('ignore')"
    load, bar, _ = CELLS
    _, _, outputs = run(text, load, bar)
    assert "100%" in "".join(output.get("text", "") for output in outputs)


def test_a_kernel_interrupts_a_request_and_cells_can_await_the_next(run):
    interrupt = """
import os, signal, threading
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()  # What "Interrupt the kernel" does.
try:
    pipe(["a red heart"] * 64, num_images=20)
    print("done")
except KeyboardInterrupt:
    print("interrupted")
"""
    _, outputs, again = run(CELLS[0], interrupt, "await pipe.agenerate('a red heart', seed=1)")
    assert [output["text"] for output in outputs] == ["interrupted\n"]
    assert png_of(again[0])
