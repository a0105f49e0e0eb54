"""All figures of a set of pictures, each with its interval: what a report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation import metrics
from evaluation.encoder.contrastive import styled_text
from evaluation.features import Embeddings, Extractor
from evaluation.metrics import Interval, bootstrap

Figures = dict[str, Interval]


@dataclass(frozen=True)
class Asked:
    """What was asked for, and all texts among which it must be found.

    Attributes:
        prompts: the prompts.
        candidates: texts by candidate; a concept of the reference has several, its captions.
        asked: int64 (prompts,), the candidate of each prompt.
        styles: the words of the styles.
        free: bool (prompts,), whether a prompt names no style.
    """

    prompts: list[str]
    candidates: list[list[str]]
    asked: NDArray[np.int64]
    styles: list[str]
    free: NDArray[np.bool_]


def ask(prompts: Sequence[str], captions: Sequence[Sequence[str]], styles: Sequence[str]) -> Asked:
    """Find the concept that each prompt asks for.

    A prompt is that of a concept if it is one of its captions, with or without the word of a style at its end. All
    other prompts are candidates of their own.
    """
    plain, free = zip(*(_without_style(prompt, styles) for prompt in prompts), strict=True)
    candidates = [list(texts) for texts in captions]
    owner = {text.lower(): i for i, texts in reversed(list(enumerate(captions))) for text in reversed(texts)}
    # A label wins over another concept's caption.
    owner |= {texts[0].lower(): i for i, texts in enumerate(captions)}
    asked = []
    for prompt in plain:
        if prompt.lower() not in owner:
            owner[prompt.lower()] = len(candidates)
            candidates.append([prompt])
        asked.append(owner[prompt.lower()])
    return Asked(list(prompts), candidates, np.array(asked), list(styles), np.array(free))


def compare(real: Embeddings, made: Embeddings, prompt: NDArray[np.int64], samples: int) -> Figures:
    """Compare made pictures with the reference.

    Args:
        real: features of the reference (n, D).
        made: features of made pictures (m, D).
        prompt: the prompt of each made picture, as a number (m,).
        samples: bootstrap samples.

    Returns:
        The figures by name. Intervals are over prompts, because pictures of one prompt resemble each other. Those of
        the distances, recall and coverage are over reference pictures as well.
    """
    found = {
        "frechet": metrics.frechet_interval(real, made, prompt, samples),
        "kernel distance": metrics.kernel_interval(real, made, prompt, samples),
    }
    if min(len(real), len(made)) > metrics.NEIGHBORS:
        found |= metrics.precision_recall_intervals(real, made, prompt, samples)
    if len(spread := metrics.diversity(made, prompt)):
        found["diversity"] = bootstrap(_mean, spread, samples=samples)
    if (real != real[0]).any():
        found["novelty"] = bootstrap(_mean, metrics.novelty(made, real), groups=(prompt,), samples=samples)
    return found


def retrieve(extractor: Extractor, made: Embeddings, prompt: NDArray[np.int64], asked: Asked, samples: int) -> Figures:
    """Measure how well pictures show what was asked.

    Returns:
        "top 1" and "top 5", how often the text that was asked for is the nearest to its picture, or among the nearest
        five. "text score", the mean cosine of a picture and its own prompt.
    """
    texts = extractor.texts([text for texts in asked.candidates for text in texts])
    owner = np.repeat(np.arange(len(asked.candidates)), [len(texts) for texts in asked.candidates])
    totals = np.zeros((len(asked.candidates), texts.shape[1]))
    np.add.at(totals, owner, metrics.unit(texts))  # a mean over captions; its length does not matter
    ranks = metrics.rank_of_asked(made, totals, asked.asked[prompt])
    own = metrics.unit(extractor.texts(asked.prompts))[prompt]
    values = {"top 1": ranks < 1, "top 5": ranks < 5, "text score": (metrics.unit(made) * own).sum(axis=1)}
    return {
        name: bootstrap(_mean, value.astype(np.float64), groups=(prompt,), samples=samples)
        for name, value in values.items()
    }


def styles_of(
    extractor: Extractor, made: Embeddings, prompt: NDArray[np.int64], asked: Asked, samples: int
) -> tuple[dict[str, int], Figures]:
    """Count the styles of pictures whose prompt names none, and say how evenly they appear.

    A picture has the style whose word, added to its prompt, is nearest to it.

    Returns:
        Pictures by style, and two figures, which are means over prompts. "styles" is how many different ones a prompt
        has. "evenness" is 1 if all are as frequent. Nothing where no prompt is free or the reference has no styles.
    """
    chosen = np.flatnonzero(asked.free)
    if not len(chosen) or len(asked.styles) < 2:
        return {}, {}
    counts = np.zeros((len(chosen), len(asked.styles)), np.int64)
    for row, number in enumerate(chosen):
        texts = extractor.texts([styled_text(asked.prompts[number], style) for style in asked.styles])
        cosines = metrics.unit(made[prompt == number]) @ metrics.unit(texts).T
        counts[row] = np.bincount(cosines.argmax(axis=1), minlength=len(asked.styles))
    evenness = np.array([metrics.evenness(row) for row in counts])
    figures = {
        "styles": bootstrap(_mean, (counts > 0).sum(axis=1).astype(np.float64), samples=samples),
        "evenness": bootstrap(_mean, evenness, samples=samples),
    }
    return dict(zip(asked.styles, counts.sum(axis=0).tolist(), strict=True)), figures


def _without_style(prompt: str, styles: Sequence[str]) -> tuple[str, bool]:
    """A prompt without the word of a style at its end, and whether it had none."""
    for style in styles:
        ending = styled_text("", style)
        if prompt.lower().endswith(ending.lower()):
            return prompt[: -len(ending)], False
    return prompt, True


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())
