"""Distances between sets of features, and what features of one set say about each other.

Features are float arrays (n, D), one row a picture. "Real" features are those of reference pictures, "made" features
those of the pictures that are judged.

Intervals are of bootstrap samples, which hold some pictures twice. Figures that look at pairs of pictures would take
the two for near neighbors. Precision, density and novelty are therefore means over pictures. Recall and coverage have
neighborhoods that are not drawn again. The kernel distance has weights that leave such pairs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, svdvals
from scipy.spatial.distance import cdist

Features = NDArray[np.floating]

NEIGHBORS = 5  # k, as in the paper of density and coverage; that of precision and recall has 3
SAMPLES = 200  # of a bootstrap
_ROWS = 1000  # of a matrix of pairs that are computed at once


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
    if min(len(real), len(made)) < real.shape[1]:
        return _frechet_of_few(real, made)(np.ones(len(real)), np.ones(len(made)))
    first, second = real.astype(np.float64), made.astype(np.float64)
    shift = first.mean(axis=0) - second.mean(axis=0)
    x, y = _scaled(first), _scaled(second)  # S_1 = x^T x, S_2 = y^T y
    # tr((S_1 S_2)^(1/2)) is the sum of the square roots of the eigenvalues of S_1^(1/2) S_2 S_1^(1/2).
    values, vectors = eigh(x.T @ x)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(eigh(root @ (y.T @ y) @ root, eigvals_only=True).clip(min=0)).sum()
    return _distance(shift, np.square(x).sum() + np.square(y).sum(), cross)


def frechet_interval(
    real: Features, made: Features, group: NDArray[np.integer] | None = None, samples: int = SAMPLES, seed: int = 0
) -> Interval:
    """Compute the Frechet distance and its interval, as `bootstrap` would; where pictures are few, in less time."""
    _check(real, made, least=2)
    if min(len(real), len(made)) >= real.shape[1]:
        return bootstrap(frechet, real, made, groups=(None, group), samples=samples, seed=seed, biased=True)
    distance, random = _frechet_of_few(real, made), np.random.default_rng(seed)

    def again() -> float:
        of_real = _counts(_again(np.arange(len(real)), random), len(real))
        of_made = _counts(_again(np.arange(len(made)) if group is None else group, random), len(made))
        return distance(of_real, of_made)

    value = distance(np.ones(len(real)), np.ones(len(made)))
    return _interval(value, np.array([again() for _ in range(samples)]), biased=True)


def _frechet_of_few(real: Features, made: Features) -> Callable[[NDArray[np.float64], NDArray[np.float64]], float]:
    """Prepare Frechet distances of samples of sets, of which one has fewer pictures than features.

    tr((S_1 S_2)^(1/2)) is the sum of the singular values of the centered inner products, which are kept. Drawing a
    picture k times scales its row of them by k^(1/2), and changes the means.

    Returns:
        A function of how often each real picture (n,) and each made one (m,) is drawn.
    """
    middle = real.mean(axis=0, dtype=np.float64)
    x, y = (rows.astype(np.float64) - middle for rows in (real, made))
    inner, squares_x, squares_y = x @ y.T, np.square(x).sum(axis=1), np.square(y).sum(axis=1)

    def distance(of_x: NDArray[np.float64], of_y: NDArray[np.float64]) -> float:
        n, m = of_x.sum(), of_y.sum()
        mean_x, mean_y = of_x @ x / n, of_y @ y / m
        spread_x = (of_x @ squares_x - n * mean_x @ mean_x) / (n - 1)
        spread_y = (of_y @ squares_y - m * mean_y @ mean_y) / (m - 1)
        centered = inner - (inner @ of_y / m)[:, None] - of_x @ inner / n + mean_x @ mean_y
        rows, columns = np.flatnonzero(of_x), np.flatnonzero(of_y)
        scale = np.sqrt(np.outer(of_x[rows] / (n - 1), of_y[columns] / (m - 1)))
        cross = svdvals(scale * centered[np.ix_(rows, columns)]).sum()
        return _distance(mean_x - mean_y, spread_x + spread_y, cross)

    return distance


def _distance(shift: NDArray[np.float64], traces: float, cross: float) -> float:
    """Sum the Frechet distance up: of the means' difference, tr(S_1 + S_2), and tr((S_1 S_2)^(1/2))."""
    return float(max(np.square(shift).sum() + traces - 2 * cross, 0.0))


def kernel_distance(real: Features, made: Features) -> float:
    """Compute the kernel inception distance: the unbiased squared MMD under the kernel (x.y / D + 1)^3.

    Binkowski et al., arXiv 1801.01401, over all pairs of pictures.
    """
    return float(_kernel_distances(real, made, np.ones((1, len(real))), np.ones((1, len(made))))[0])


def kernel_interval(
    real: Features, made: Features, group: NDArray[np.integer] | None = None, samples: int = SAMPLES, seed: int = 0
) -> Interval:
    """Compute the kernel distance and its interval; arguments are those of `bootstrap`."""
    _check(real, made, least=2)
    of_real, of_made = _drawn(real, made, group, samples, seed)
    ones = np.ones((1, len(real))), np.ones((1, len(made)))
    found = _kernel_distances(real, made, *(np.vstack(both) for both in zip(ones, (of_real, of_made), strict=True)))
    return _interval(float(found[0]), found[1:], biased=True)  # a group drawn twice is paired with its like more often


def precision_recall(real: Features, made: Features, k: int = NEIGHBORS) -> dict[str, NDArray[np.float64]]:
    """Compute precision, recall, density and coverage, each as the mean over the values that are returned.

    Precision and recall: Kynkaanniemi et al., arXiv 1904.06991. Density and coverage: Naeem et al., arXiv 2002.09797.
    Precision and density say how real the pictures are, recall and coverage how much of the reference they cover.

    Returns:
        precision and density: a value for each made picture; recall and coverage: one for each real picture.

    Raises:
        ValueError: a set has no more than k pictures.
    """
    return _of_pictures(*_neighborhoods(real, made, k), k)


def precision_recall_intervals(
    real: Features, made: Features, group: NDArray[np.integer] | None = None, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Compute precision, recall, density and coverage and their intervals; arguments are those of `bootstrap`.

    Neighborhoods are those of the whole sets. Precision and density are means over made pictures, which are drawn
    again. Recall and coverage ask whether any made picture is near a real one, so both sets are drawn again.
    """
    around_real, around_made = _neighborhoods(real, made, NEIGHBORS)
    of_real, of_made = _drawn(real, made, group, samples, seed)
    found = {}
    for name, value in _of_pictures(around_real, around_made, NEIGHBORS).items():
        if name in ("precision", "density"):
            found[name] = bootstrap(np.mean, value, groups=(group,), samples=samples, seed=seed)
        else:
            again = _shares(around_made if name == "recall" else around_real, of_real, of_made)
            own = _interval(float(value.mean()), again, biased=True)  # fewer different pictures cover less
            found[name] = Interval(own.value, max(own.low, 0.0), min(own.high, 1.0))
    return found


def rank_of_asked(image: Features, text: Features, asked: NDArray[np.integer]) -> NDArray[np.int64]:
    """Count for each picture the texts that are nearer to it, by cosine, than the one that was asked for.

    Args:
        image: embeddings of pictures (n, D).
        text: embeddings of all concepts (K, D), in the same space.
        asked: the concept of each picture (n,), an index into text.

    Returns:
        Ranks (n,): 0 where the asked concept is found first.
    """
    pictures, texts = unit(image), unit(text)
    ranks = []
    for start in range(0, len(pictures), _ROWS):  # 30,000 pictures and as many texts would take 7 GB at once.
        part = slice(start, start + _ROWS)
        cosines = pictures[part] @ texts.T
        ranks.append((cosines > cosines[np.arange(len(cosines)), asked[part]][:, None]).sum(axis=1))
    return np.concatenate(ranks)


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
    """Compute the distance of each picture to the nearest training picture, (n,).

    The unit is the median distance of a training picture to the nearest other one, where equal pictures count as one.
    1 is as far as training pictures are from each other, and 0 is a copy.

    Raises:
        ValueError: there are fewer than two different training pictures, no made ones, or features of different
            lengths.
    """
    _check(training, made, least=1)
    different = np.unique(training, axis=0)
    if len(different) < 2:
        raise ValueError(f"training: expected at least 2 different pictures, got {len(different)}")
    nearest = np.concatenate([distances.min(axis=1) for _, distances in _distances(made, different)])
    return nearest / np.median(_radii(different, 1))


def evenness(counts: NDArray[np.integer]) -> float:
    """Say how evenly pictures fall on kinds, such as styles: entropy over its maximum, 0 for one kind, 1 for even."""
    shares = np.asarray(counts, dtype=np.float64)
    if len(shares) < 2 or not shares.sum():
        return 0.0
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))


def bootstrap(
    figure: Callable[..., float],
    *sets: NDArray[np.generic],
    groups: tuple[NDArray[np.integer] | None, ...] = (),
    samples: int = SAMPLES,
    seed: int = 0,
    biased: bool = False,
) -> Interval:
    """Compute `figure(*sets)` and its 95 % interval over sets that are sampled again with replacement.

    Args:
        figure: a function of the sets, such as `frechet`.
        sets: arrays whose first axis counts pictures. Each is sampled by itself.
        groups: for each set, numbers (n,) of groups that are drawn as a whole, such as the pictures of one prompt,
            which resemble each other; None or nothing where each picture is its own.
        samples: bootstrap samples.
        seed: of the samples.
        biased: whether the figure is biased for few pictures, as a Frechet distance is. It is more so in bootstrap
            samples, which have fewer different ones. The interval then has the width of theirs, around the figure.
    """
    random = np.random.default_rng(seed)
    own = [
        np.arange(len(rows)) if i >= len(groups) or groups[i] is None else np.asarray(groups[i])
        for i, rows in enumerate(sets)
    ]
    found = [
        figure(*(rows[_again(group, random)] for rows, group in zip(sets, own, strict=True))) for _ in range(samples)
    ]
    return _interval(figure(*sets), np.array(found), biased)


def unit(rows: Features) -> Features:
    """Scale rows to length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)


def _interval(value: float, found: NDArray[np.float64], biased: bool = False) -> Interval:
    low, high = np.quantile(found, [0.025, 0.975]) + (value - found.mean() if biased else 0)
    return Interval(value, float(low), float(high))


def _again(group: NDArray[np.integer], random: np.random.Generator) -> NDArray[np.int64]:
    """Draw as many groups as there are, with replacement => numbers of pictures."""
    _, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
    order, ends = np.argsort(inverse, kind="stable"), np.cumsum(counts)
    drawn = random.integers(len(counts), size=len(counts))
    return np.concatenate([order[ends[i] - counts[i] : ends[i]] for i in drawn])


def _counts(rows: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return np.bincount(rows, minlength=count).astype(np.float64)


def _drawn(
    real: Features, made: Features, group: NDArray[np.integer] | None, samples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count how often each picture is in each bootstrap sample, (S, n) and (S, m). A sample has two different ones."""
    random = np.random.default_rng(seed)
    own = np.arange(len(made)) if group is None else group

    def drawn(groups: NDArray[np.integer]) -> NDArray[np.float64]:
        while np.count_nonzero(counts := _counts(_again(groups, random), len(groups))) < 2:
            pass
        return counts

    return tuple(np.array([drawn(one) for _ in range(samples)]) for one in (np.arange(len(real)), own))


def _neighborhoods(real: Features, made: Features, k: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Say which made pictures lie in the neighborhood of each real one, and the other way round, both (n, m).

    A copy lies there always, also where so many pictures are equal that the neighborhood has no radius.
    """
    _check(real, made, least=k + 1)
    real_radii, made_radii = _radii(real, k), _radii(made, k)
    around_real, around_made = (np.empty((len(real), len(made)), np.bool_) for _ in range(2))
    for part, distances in _distances(real, made):
        around_real[part] = (distances < real_radii[part, None]) | (distances == 0)
        around_made[part] = (distances < made_radii) | (distances == 0)
    return around_real, around_made


def _of_pictures(
    around_real: NDArray[np.bool_], around_made: NDArray[np.bool_], k: int
) -> dict[str, NDArray[np.float64]]:
    return {
        "precision": around_real.any(axis=0).astype(np.float64),
        "recall": around_made.any(axis=1).astype(np.float64),
        "density": around_real.sum(axis=0) / k,
        "coverage": around_real.any(axis=1).astype(np.float64),
    }


def _shares(
    around: NDArray[np.bool_], of_real: NDArray[np.float64], of_made: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute for each sample the share of its real pictures that have any of its made pictures around them, (S,)."""
    there, total = (of_made > 0).astype(np.float32), np.zeros(len(of_made))
    for start in range(0, len(around), _ROWS):
        part = slice(start, start + _ROWS)
        total += (of_real[:, part] * (there @ around[part].T.astype(np.float32) > 0)).sum(axis=1)
    return total / of_real.sum(axis=1)


def _scaled(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return (rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1)


def _kernel_distances(
    real: Features, made: Features, of_real: NDArray[np.float64], of_made: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute a kernel distance for every row of weights (S, n) and (S, m), which count how often a picture is there.

    A picture is never paired with itself, nor with its copies in a bootstrap sample.
    """
    _check(real, made, least=2)

    def pairs(
        x: Features, y: Features, of_x: NDArray[np.float64], of_y: NDArray[np.float64], same: bool
    ) -> NDArray[np.float64]:
        total = np.zeros(len(of_x))
        for start in range(0, len(x), _ROWS):
            part = slice(start, start + _ROWS)
            kernel = (x[part].astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3
            if same:
                kernel[np.arange(len(kernel)), np.arange(start, start + len(kernel))] = 0
            total += ((of_x[:, part] @ kernel) * of_y).sum(axis=1)
        return total

    def within(x: Features, of_x: NDArray[np.float64]) -> NDArray[np.float64]:
        return pairs(x, x, of_x, of_x, same=True) / (of_x.sum(axis=1) ** 2 - np.square(of_x).sum(axis=1))

    across = pairs(real, made, of_real, of_made, same=False) / (of_real.sum(axis=1) * of_made.sum(axis=1))
    return within(real, of_real) + within(made, of_made) - 2 * across


def _radii(features: Features, k: int) -> NDArray[np.float64]:
    """Distances to the k-th neighbor, not counting the picture itself."""
    parts = (np.partition(distances, k, axis=1)[:, k] for _, distances in _distances(features, features))
    return np.concatenate([part.copy() for part in parts])  # A view would keep the distances of its part.


def _distances(x: Features, y: Features) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Go through the rows of x in parts => their place, and their distances to all rows of y."""
    for start in range(0, len(x), _ROWS):
        part = slice(start, start + _ROWS)
        yield part, cdist(x[part], y)


def _check(real: Features, made: Features, least: int) -> None:
    for name, rows in (("real", real), ("made", made)):
        if rows.ndim != 2 or len(rows) < least:
            raise ValueError(f"{name}: expected at least {least} rows of features (n, D), got shape {rows.shape}")
    if real.shape[1] != made.shape[1]:
        raise ValueError(f"made: expected features of length {real.shape[1]}, got {made.shape[1]}")
