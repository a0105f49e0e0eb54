"""What a notebook shows of a result, and the progress bar, without a notebook."""

import base64
import io
import subprocess
import sys
from typing import ClassVar

import pytest
from PIL import Image
from tiue_runtime import Cancelled, read_record
from tiue_runtime.notebook import MOST_PICTURES, MOST_PIXELS, ProgressBar

HEART, STAR = "a red heart", "a blue star"


def png_of(result):
    data, metadata = result._repr_mimebundle_(include=None, exclude=None)
    assert set(data) == {"text/plain", "image/png"} and data["text/plain"] == repr(result)
    file = base64.b64decode(data["image/png"], validate=True)
    with Image.open(io.BytesIO(file)) as image:
        assert image.format == "PNG"
        return file, image.convert("RGB"), metadata


def test_one_picture_is_shown_as_it_is_and_holds_its_record(pipe, tmp_path):
    result = pipe(HEART, seed=1)
    file, image, metadata = png_of(result)
    assert image.tobytes() == result.images[0].tobytes()
    assert metadata == {"image/png": {"alt": HEART}}
    (tmp_path / "saved.png").write_bytes(file)
    assert read_record(tmp_path / "saved.png") == result.images[0].record


def test_several_pictures_become_a_sheet_with_a_row_for_each_prompt(pipe):
    result = pipe([HEART, STAR], num_images=3, seed=1)
    _, sheet, metadata = png_of(result)
    assert metadata["image/png"]["alt"] == f"{HEART}; {STAR}"
    (width, height), gap = result.images[0].size, 1
    assert sheet.size == (3 * (width + gap) + gap, 2 * (height + gap) + gap)
    for index, image in enumerate(result.images):
        left, top = gap + index % 3 * (width + gap), gap + index // 3 * (height + gap)
        assert sheet.crop((left, top, left + width, top + height)).tobytes() == image.tobytes()


def test_arrays_of_pictures_are_shown_and_latents_are_not(pipe):
    of_pictures = pipe(HEART, num_images=2, seed=1, output_type="np")
    assert png_of(of_pictures)[1].tobytes() == png_of(pipe(HEART, num_images=2, seed=1))[1].tobytes()
    latents = pipe(HEART, seed=1, output_type="latent")
    assert latents._repr_mimebundle_() == ({"text/plain": repr(latents)}, {})
    assert "array (1, 4, " in repr(latents)


def test_pictures_without_a_prompt_or_a_seed_are_shown(pipe):
    text = pipe.encode(HEART)
    noise = pipe(HEART, seed=1, output_type="latent").images
    result = pipe(prompt_embeds=text, latents=noise)
    assert png_of(result)[2] == {} and "seed" not in repr(result)


@pytest.mark.parametrize(
    ("prompts", "num_images", "height", "width"),
    [(1, 1, 1000, 3000), (1, 2, 800, 1600), (1, 70, 8, 8), (12, 9, 64, 64), (40, 2, 128, 64), (2, 3, 200, 1000)],
)
def test_what_is_shown_is_limited(pipe, prompts, num_images, height, width):
    """The pictures are stand-ins, because only their sizes matter."""
    result = pipe([HEART] * prompts, num_images=num_images, seed=1)
    result.images[:] = [Image.new("RGB", (width, height), "red") for _ in result.images]
    file, sheet, _ = png_of(result)
    assert sheet.width * sheet.height <= MOST_PIXELS
    red = sum(count for count, color in sheet.getcolors(2**20) if color == (255, 0, 0))
    shown = min(len(result.images), MOST_PICTURES)
    assert red >= min(0.5 * MOST_PIXELS, shown * height * width) * 0.5
    assert len(file) < 4 * MOST_PIXELS


def test_a_long_prompt_does_not_fill_the_notebook(pipe):
    with pytest.warns(UserWarning):
        result = pipe("red " * 50_000, num_images=2, seed=1)
    assert len(png_of(result)[2]["image/png"]["alt"]) <= 1000
    assert len(repr(result)) < 100


def test_the_text_of_a_result_is_one_line(pipe):
    one, three = pipe(HEART, seed=5), pipe(HEART, num_images=3, seed=5)
    assert repr(one).startswith("<Result: 1 picture, seed 5, ") and repr(one).endswith(" s on cpu>")
    assert repr(three).startswith("<Result: 3 pictures, seeds 5 to 7, ")


class Bar:
    """Stands for tqdm, and keeps what it is told."""

    made: ClassVar[list] = []

    def __init__(self, **options):
        assert options["total"] == 1.0
        self.n, self.shown, self.closed = 0.0, [], False
        Bar.made.append(self)

    def set_description_str(self, text):
        self.shown.append((self.n, text))

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    import tqdm.auto

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


def test_the_bar_shows_every_part_of_a_request_and_ends_with_it(pipe, bars):
    plain, watched = pipe(HEART, seed=1), pipe(HEART, seed=1, callback=ProgressBar())
    assert watched.memory == plain.memory  # The bar wants no previews.
    (bar,) = bars
    assert bar.closed and bar.n == pytest.approx(1)
    assert bar.shown[0][1] == "text_encoder 1 of 1"
    assert [n for n, _ in bar.shown] == sorted(n for n, _ in bar.shown)


def test_requests_can_share_a_bar_also_after_one_failed(pipe, bars):
    bar = ProgressBar()
    pipe(HEART, seed=1, callback=bar)
    with pytest.raises(Cancelled):
        pipe(HEART, seed=1, callback=lambda progress: bar(progress) or progress.stage == "unet_encoder")
    assert [made.closed for made in bars] == [True, False]
    pipe(HEART, seed=1, callback=bar)
    assert [made.closed for made in bars] == [True, True, True]


def test_the_bar_is_a_line_on_stderr_outside_a_notebook(tiny):
    program = f"""
from tiue_runtime import Pipeline
from tiue_runtime.notebook import ProgressBar
Pipeline.load({str(tiny)!r}, device="cpu")("a red heart", seed=1, callback=ProgressBar())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout
    assert "unet_decoder" in done.stderr and "100%" in done.stderr


def test_showing_needs_no_ipython(tiny):
    program = f"""
import sys
sys.modules["IPython"] = sys.modules["ipywidgets"] = None
from tiue_runtime import Pipeline
data, metadata = Pipeline.load({str(tiny)!r}, device="cpu")("a red heart", seed=1)._repr_mimebundle_()
print(*data)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "text/plain image/png\n", "")
