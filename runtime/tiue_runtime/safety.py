"""The safety checker: it scores finished pictures, and flagged ones are blurred beyond recognition."""

from collections.abc import Sequence

import numpy as np
from PIL import ImageFilter
from PIL.Image import Image, Resampling

from tiue_runtime.bundle import IMAGE, SAFETY_CHECKER, SCORE, SafetyChecker
from tiue_runtime.graphs import Turns
from tiue_runtime.ort.graph import Float32, Graph

BLUR = 1 / 8
"""The standard deviation of the blur, as a part of the longer side: eight blots of color are left."""


def flag(turns: Turns, graph: Graph, how: SafetyChecker, pictures: Sequence[Image]) -> tuple[bool, ...]:
    """Say which pictures the safety checker flags. They are checked one by one, in the memory of one.

    Args:
        turns: runs the graph.
        graph: the safety checker.
        how: how it gets pictures.
        pictures: in mode RGB.

    Raises:
        InferenceError: the graph failed, or a score is not finite: nothing passes unchecked.
        Cancelled: the caller wants to stop.
    """
    flagged: list[bool] = []
    for done, picture in enumerate(pictures, start=1):
        with turns.graphs.budget.run(SAFETY_CHECKER, 1, 1, keeps=lambda: graph.keeps):
            score = turns(SAFETY_CHECKER, graph, {IMAGE: prepare(picture, how)})[SCORE]
        graph.check_output(SCORE, score, (1,), turns.graphs.overflow_remedy())
        flagged.append(bool(score[0] > 0))
        turns.run.report(SAFETY_CHECKER, done, len(pictures))
    return tuple(flagged)


def prepare(picture: Image, how: SafetyChecker) -> Float32:
    """Resize and crop a picture => float32 (1, 3, S, S) in [-1, 1], as CLIPImageProcessor of transformers does."""
    width, height = picture.size
    longer = int(how.resize * max(width, height) / min(width, height))
    size = (how.resize, longer) if width <= height else (longer, how.resize)
    small = np.asarray(picture.resize(size, Resampling[how.filter.upper()]))
    top, left = (side // 2 for side in (small.shape[0] - how.crop, small.shape[1] - how.crop))
    square = small[top : top + how.crop, left : left + how.crop].astype(np.float32)
    return np.ascontiguousarray((square / np.float32(127.5) - 1).transpose(2, 0, 1)[None])


def blurred(picture: Image) -> Image:
    """Return a picture of which only a few blots of color are left."""
    return picture.filter(ImageFilter.GaussianBlur(BLUR * max(picture.size)))
