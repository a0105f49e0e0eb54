"""What notebooks show of a result, and a progress bar for them. Nothing here needs IPython."""

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from tiue_runtime.contact_sheet import Sheet
from tiue_runtime.errors import clip
from tiue_runtime.images import Picture
from tiue_runtime.progress import Progress

if TYPE_CHECKING:
    from tiue_runtime.record import Record

# A notebook's file holds all that it shows.
MOST_PICTURES = 64
MOST_PIXELS = 2**20
MOST_WORDS = 500  # characters of the alternative text

_LONGEST_ROW = 8  # The pictures of one prompt stay in one row if there are not more.


def mime_bundle(
    pictures: Sequence[Image], records: "Sequence[Record]"
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Make one picture of all pictures, in the form of Jupyter's messages.

    Args:
        pictures: at least one. Of more than MOST_PICTURES, the first are shown.
        records: one per picture, or none. Their prompts describe the picture to people who do not see it.

    Returns:
        By MIME type: a PNG in base64 with about MOST_PIXELS pixels at most, and its metadata.
    """
    prompts = records[0].prompts if records else 1
    picture = _reduced(pictures[0], MOST_PIXELS) if len(pictures) == 1 else _sheet(pictures, prompts)
    file = io.BytesIO()
    Picture.of(picture).save(file, "PNG")
    texts = dict.fromkeys(record.prompt for record in records[:MOST_PICTURES] if record.prompt)
    words = clip("; ".join(texts), MOST_WORDS)
    metadata = {"image/png": {"alt": words}} if words else {}
    return {"image/png": base64.b64encode(file.getvalue()).decode("ascii")}, metadata


def _sheet(pictures: Sequence[Image], prompts: int) -> Image:
    """Return the first pictures on one sheet, each prompt in a row of its own if its pictures are few."""
    shown, per_prompt = pictures[:MOST_PICTURES], max(len(pictures) // prompts, 1)
    layout = (-(-len(shown) // per_prompt), per_prompt) if per_prompt <= _LONGEST_ROW else (1, len(shown))
    whole = Sheet(*layout, *shown[0].size)
    part = MOST_PIXELS / (whole.width * whole.height)
    small = [_reduced(picture, part * picture.width * picture.height) for picture in shown]
    return Sheet(*layout, *small[0].size).make(small)


def _reduced(picture: Image, most: float) -> Image:
    """Return a picture of at most so many pixels: the same one if it has no more."""
    scale = math.sqrt(most / (picture.width * picture.height))
    if scale >= 1:
        return picture
    return picture.resize((max(int(picture.width * scale), 1), max(int(picture.height * scale), 1)))


class ProgressBar:
    """A callback that shows how far a request is: a widget in a notebook, a line on stderr elsewhere.

        pipe("a red heart", callback=ProgressBar())

    The bar is gone when the request is done. If the request fails, the bar stays where it was. Requests that follow
    each other can share a bar. Requests at the same time need one each.
    """

    previews = False  # so that the memory mode is the same with and without a bar

    def __init__(self) -> None:
        self._bar: Any = None
        self._seconds = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show how far the request is."""
        bar = self._bar
        if bar is None or progress.seconds < self._seconds or progress.fraction < bar.n:
            bar = self._begin()
        self._seconds = progress.seconds
        bar.n = progress.fraction
        bar.set_description_str(f"{progress.stage} {progress.step} of {progress.steps}")
        if progress.fraction > 1 - 1e-6:  # a sum of shares, with its rounding
            self._end()

    def _begin(self) -> Any:
        from tqdm.auto import tqdm

        self._end()
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(total=1.0, leave=False, dynamic_ncols=True, bar_format=form)
        return self._bar

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
