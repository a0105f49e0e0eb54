"""Distances between sets of features, and what features of one set say about each other.

Features are float arrays (n, D), one row a picture. "Real" features are those of reference pictures, "made" features
those of the pictures that are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.spatial.distance import cdist

Features = NDArray[np.floating]

NEIGHBOURS = 5  # k of precision, recall, density and coverage, as in their papers
SUBSET = 1000  # the largest number of pictures in a subset of the kernel distance, as in its paper


@dataclass(frozen=True)
class Interval:
    """A figure, and the interval that holds it in 95 % of bootstrap samples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def frechet(real: Features, made: Features) -> float:
    """Compute the Frechet distance between Gaussians that are fitted to two sets of features.

    Heusel et al., arXiv 1706.08500, eq. 6: |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)). With few pictures the
    distance is biased upwards, so compare only distances of equally many pictures.

    Raises:
        ValueError: a set has fewer than two pictures, or the sets have features of different lengths.
    """
    _check(real, made, least=2)
    first, second = _gaussian(real), _gaussian(made)
    # tr((S_1 S_2)^(1/2)) is the sum of the square roots of the eigenvalues of S_1^(1/2) S_2 S_1^(1/2).
    values, vectors = eigh(first[1])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(eigh(root @ second[1] @ root, eigvals_only=True).clip(min=0)).sum()
    distance = np.square(first[0] - second[0]).sum() + np.trace(first[1]) + np.trace(second[1]) - 2 * cross
    return float(max(distance, 0.0))


def kernel_distance(real: Features, made: Features, subsets: int = 50, seed: int = 0) -> float:
    """Compute the kernel inception distance: the unbiased squared MMD under the kernel (x.y / D + 1)^3.

    Binkowski et al., arXiv 1801.01401. The mean over random subsets of at most SUBSET pictures.
    """
    _check(real, made, least=2)
    random = np.random.default_rng(seed)
    size = min(len(real), len(made), SUBSET)
    found = []
    for _ in range(subsets if size < max(len(real), len(made)) else 1):
        x = real[random.choice(len(real), size, replace=False)].astype(np.float64)
        y = made[random.choice(len(made), size, replace=False)].astype(np.float64)
        xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
        pairs = size * (size - 1)
        found.append((xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / pairs - 2 * xy.mean())
    return float(np.mean(found))


def precision_recall(real: Features, made: Features, k: int = NEIGHBOURS) -> dict[str, float]:
    """Compute precision, recall, density and coverage from distances to the k-th neighbour.

    Precision and recall: Kynkaanniemi et al., arXiv 1904.06991. Density and coverage: Naeem et al., arXiv 2002.09797.
    Precision and density say how real the pictures are, recall and coverage how much of the reference they cover.

    Raises:
        ValueError: a set has no more than k pictures.
    """
    _check(real, made, least=k + 1)
    around_real, around_made = _radii(real, k), _radii(made, k)
    distances = cdist(real, made)
    inside_real = distances < around_real[:, None]
    return {
        "precision": float(inside_real.any(axis=0).mean()),
        "recall": float((distances < around_made[None, :]).any(axis=1).mean()),
        "density": float(inside_real.sum(axis=0).mean() / k),
        "coverage": float((distances.min(axis=1) < around_real).mean()),
    }


def retrieval(image: Features, text: Features, asked: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Tell for each picture whether the nearest of all texts, by cosine, is the one that was asked for.

    Args:
        image: embeddings of pictures (n, D).
        text: embeddings of all concepts (K, D), in the same space.
        asked: the concept of each picture (n,), an index into text.
    """
    return (_unit(image) @ _unit(text).T).argmax(axis=1) == asked


def diversity(made: Features, prompt: NDArray[np.integer]) -> NDArray[np.float64]:
    """Compute, for each prompt, the mean distance between the pictures that different seeds give.

    Args:
        made: features (n, D).
        prompt: the prompt of each picture (n,), as a number.

    Returns:
        One distance for each prompt that has at least two pictures, in the order of the prompts' numbers.
    """
    spread = []
    for number in np.unique(prompt):
        rows = made[prompt == number]
        if len(rows) > 1:
            distances = cdist(rows, rows)
            spread.append(distances.sum() / (len(rows) * (len(rows) - 1)))
    return np.array(spread)


def novelty(made: Features, training: Features) -> NDArray[np.float64]:
    """Compute the distance of each picture to the nearest training picture, (n,)."""
    _check(training, made, least=1)
    return cdist(made, training).min(axis=1)


def evenness(counts: NDArray[np.integer]) -> float:
    """Say how evenly pictures fall on kinds, such as styles: entropy over its maximum, 0 for one kind, 1 for even."""
    shares = np.asarray(counts, dtype=np.float64)
    if len(shares) < 2 or not shares.sum():
        return 0.0
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))


def bootstrap(figure: Callable[..., float], *sets: NDArray[np.generic], samples: int = 200, seed: int = 0) -> Interval:
    """Compute `figure(*sets)` and its 95 % interval over sets that are sampled again with replacement.

    Args:
        figure: a function of the sets, such as `frechet`.
        sets: arrays whose first axis counts pictures. Each is sampled by itself.
        samples: bootstrap samples.
    """
    random = np.random.default_rng(seed)
    again = [figure(*(rows[random.integers(len(rows), size=len(rows))] for rows in sets)) for _ in range(samples)]
    low, high = np.quantile(again, [0.025, 0.975])
    return Interval(figure(*sets), float(low), float(high))


def _gaussian(features: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = features.astype(np.float64)
    return rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False))


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _radii(features: Features, k: int) -> NDArray[np.float64]:
    """Distances to the k-th neighbour, not counting the picture itself."""
    return np.partition(cdist(features, features), k, axis=1)[:, k]


def _unit(rows: Features) -> Features:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)


def _check(real: Features, made: Features, least: int) -> None:
    for name, rows in (("real", real), ("made", made)):
        if rows.ndim != 2 or len(rows) < least:
            raise ValueError(f"{name}: expected at least {least} rows of features (n, D), got shape {rows.shape}")
    if real.shape[1] != made.shape[1]:
        raise ValueError(f"made: expected features of length {real.shape[1]}, got {made.shape[1]}")
