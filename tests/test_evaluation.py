"""The evaluation's figures on sets whose answer is known."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation import inception, metrics

RANDOM = np.random.default_rng(0)


def gaussian(count: int, mean: float = 0.0, scale: float = 1.0, length: int = 4) -> np.ndarray:
    return mean + scale * RANDOM.standard_normal((count, length))


def whitened(count: int, length: int = 4) -> np.ndarray:
    """Features whose sample mean is 0 and whose sample covariance is the identity, to rounding."""
    rows = gaussian(count, length=length)
    rows -= rows.mean(axis=0)
    return rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T


def test_the_frechet_distance_of_known_gaussians():
    rows = whitened(500)
    assert metrics.frechet(rows, rows) == pytest.approx(0, abs=1e-8)
    # |mu|^2 = 4 * 2^2, and tr(I + 9 I - 2 * 3 I) = 4 * 4.
    assert metrics.frechet(rows, 3 * rows + 2) == pytest.approx(16 + 16)
    assert metrics.frechet(rows, 3 * rows + 2) == pytest.approx(metrics.frechet(3 * rows + 2, rows))


def test_the_kernel_distance_is_unbiased():
    same = [metrics.kernel_distance(gaussian(200), gaussian(200)) for _ in range(20)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    assert metrics.kernel_distance(gaussian(200), gaussian(200, mean=1)) > 10 * np.std(same)
    # Two pictures each, by hand: k(a, b) = (a b + 1)^3.
    real, made = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    assert metrics.kernel_distance(real, made) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_precision_and_recall_tell_realism_from_variety():
    real = gaussian(400)
    assert all(0.8 < value < 1.2 for value in metrics.precision_recall(real, gaussian(400)).values())
    narrow = metrics.precision_recall(real, gaussian(400, scale=0.1))
    assert narrow["precision"] == 1 and narrow["recall"] < 0.1 and narrow["coverage"] < 0.5
    elsewhere = metrics.precision_recall(real, gaussian(400, mean=50))
    assert set(elsewhere.values()) == {0.0}


def test_retrieval_by_cosine():
    text = np.eye(3)
    image = np.array([[5.0, 1, 0], [0, 0.1, 0.05], [0, 1, 0]])
    assert metrics.retrieval(image, text, np.array([0, 1, 2])).tolist() == [True, True, False]


def test_diversity_by_prompt():
    made = np.array([[0.0], [2.0], [7.0], [7.0], [1.0]])
    assert metrics.diversity(made, np.array([0, 0, 1, 1, 2])).tolist() == [2.0, 0.0]


def test_novelty_is_the_distance_to_the_nearest_training_picture():
    assert metrics.novelty(np.array([[0.0], [10.0]]), np.array([[1.0], [4.0]])).tolist() == [1.0, 6.0]


@pytest.mark.parametrize(("counts", "expected"), [([4, 4], 1), ([8, 0], 0), ([1, 1, 0, 0], 0.5), ([0, 0], 0), ([3], 0)])
def test_evenness(counts, expected):
    assert metrics.evenness(np.array(counts)) == pytest.approx(expected)


def test_a_bootstrap_interval_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(100):
        rows = np.random.default_rng(seed).standard_normal(50)
        found = metrics.bootstrap(lambda x: float(x.mean()), rows, seed=seed)
        assert found.low <= found.value <= found.high
        held += found.low <= 0 <= found.high
    assert 85 <= held <= 100


@pytest.mark.parametrize(
    ("real", "made"), [(np.ones((1, 2)), np.ones((5, 2))), (np.ones((5, 2)), np.ones((5, 3))), (np.ones(5), np.ones(5))]
)
def test_sets_that_cannot_be_compared_are_refused(real, made):
    with pytest.raises(ValueError, match="expected"):
        metrics.frechet(real, made)


def layer(kind: str, name: str, inputs: list[str], **config: object) -> dict:
    return {"name": name, "class_name": kind, "config": config, "inbound_nodes": [[[i, 0, 0, {}] for i in inputs]]}


def test_a_keras_graph_runs_as_its_layers_say():
    layers = [
        {"name": "in", "class_name": "InputLayer", "config": {}, "inbound_nodes": []},
        layer("Conv2D", "conv", ["in"], strides=[2, 2], padding="valid"),
        layer("BatchNormalization", "norm", ["conv"], epsilon=0.25),
        layer("Activation", "relu", ["norm"]),
        layer("AveragePooling2D", "mean", ["relu"], pool_size=[3, 3], strides=[1, 1], padding="same"),
        layer("Concatenate", "both", ["relu", "mean"]),
        layer("Dense", "head", ["both"]),
    ]
    weights = {
        "conv/kernel": np.full((1, 1, 3, 1), 2, np.float32),
        "norm/beta": np.array([1], np.float32),
        "norm/moving_mean": np.array([3], np.float32),
        "norm/moving_variance": np.array([0.75], np.float32),
    }
    features = inception.Inception(layers, weights)(torch.full((2, 3, 8, 8), 0.75))
    # 2 * 3 * 0.75 = 4.5; (4.5 - 3) / sqrt(0.75 + 0.25) + 1 = 2.5. Padding does not count in the average.
    torch.testing.assert_close(features, torch.full((2, 2), 2.5))


def test_an_unknown_layer_is_refused():
    layers = [
        {"name": "in", "class_name": "InputLayer", "config": {}, "inbound_nodes": []},
        layer("LSTM", "memory", ["in"]),
    ]
    with pytest.raises(ValueError, match="LSTM"):
        inception.Inception(layers, {})(torch.zeros(1, 3, 8, 8))


def test_a_package_without_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nsfwjs@4\.4\.0"):
        inception.load_inception(tmp_path)


def test_node_is_asked_for_when_it_is_missing(tmp_path, monkeypatch):
    folder = tmp_path / "dist/models/inception_v3"
    folder.mkdir(parents=True)
    (folder / "model.min.js").touch()

    def missing(*_: object, **__: object) -> SimpleNamespace:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(ValueError, match="needs Node"):
        inception.load_inception(tmp_path)
