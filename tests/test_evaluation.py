"""The evaluation's figures on sets whose answer is known."""

import json
import subprocess
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation import devices, figures, inception, metrics

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


def test_the_frechet_distance_of_fewer_pictures_than_features():
    real, made = gaussian(12, length=30), gaussian(8, mean=0.5, length=30)
    padded = np.hstack([real, np.zeros((12, 1))]), np.hstack([made, np.zeros((8, 1))])
    many = np.tile(real, (9, 1)), np.tile(made, (9, 1))  # the same Gaussians but for n / (n - 1), in more rows
    scaled = [
        rows.mean(0) + (rows - rows.mean(0)) * np.sqrt((n * 9 - 1) / ((n - 1) * 9))
        for rows, n in zip(many, (12, 8), strict=True)
    ]
    assert metrics.frechet(real, made) == pytest.approx(metrics.frechet(*scaled), rel=1e-6)
    assert metrics.frechet(real, made) == pytest.approx(metrics.frechet(*padded), rel=1e-6)


@pytest.mark.parametrize("length", [4, 200])
def test_the_interval_of_the_frechet_distance_is_that_of_the_bootstrap(length):
    real, made = gaussian(60, length=length), gaussian(30, mean=0.5, length=length)
    group = np.repeat(np.arange(12), [1, 4] * 6)  # groups of different sizes
    expected = metrics.bootstrap(metrics.frechet, real, made, groups=(None, group), samples=20, biased=True)
    found = metrics.frechet_interval(real, made, group, samples=20)
    assert asdict(found) == pytest.approx(asdict(expected), rel=1e-9)
    assert found.low < found.value < found.high


def test_the_kernel_distance_is_unbiased():
    same = [metrics.kernel_distance(gaussian(200), gaussian(200)) for _ in range(20)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    assert metrics.kernel_distance(gaussian(200), gaussian(200, mean=1)) > 10 * np.std(same)
    # Two pictures each, by hand: k(a, b) = (a b + 1)^3.
    real, made = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    assert metrics.kernel_distance(real, made) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)
    assert metrics.kernel_distance(real, real) == pytest.approx(1 + 1 - 2 * (1 + 1 + 1 + 8) / 4)


def test_distances_of_many_pictures_are_computed_in_parts(monkeypatch):
    real, made = gaussian(23), gaussian(17)
    kernel, around, novelty = metrics.kernel_distance(real, made), means(real, made), metrics.novelty(made, real)
    rows, cdist = [], metrics.cdist
    monkeypatch.setattr(metrics, "cdist", lambda x, y: rows.append(len(x)) or cdist(x, y))
    monkeypatch.setattr(metrics, "_ROWS", 5)
    assert metrics.kernel_distance(real, made) == pytest.approx(kernel, rel=1e-9)
    assert means(real, made) == around and metrics.novelty(made, real).tolist() == novelty.tolist()
    assert max(rows) == 5 and min(rows) > 0


def test_copies_in_a_bootstrap_sample_do_not_count_as_near_pictures():
    real, made = gaussian(60), gaussian(60, mean=1)
    found = metrics.kernel_interval(real, made)
    assert found.value == metrics.kernel_distance(real, made)
    again = [metrics.kernel_distance(gaussian(60), gaussian(60, mean=1)) for _ in range(100)]
    assert found.high - found.low == pytest.approx(4 * np.std(again), rel=0.5)


def test_the_interval_of_the_kernel_distance_holds_it_when_pictures_of_a_prompt_are_alike():
    prompt = np.repeat(np.arange(10), 12)
    made = gaussian(10)[prompt] + gaussian(120, scale=0.1)
    found = metrics.kernel_interval(gaussian(200), made, prompt)
    assert found.low < found.value < found.high


def means(real: np.ndarray, made: np.ndarray) -> dict[str, float]:
    return {name: values.mean() for name, values in metrics.precision_recall(real, made).items()}


def test_precision_and_recall_tell_realism_from_variety():
    real = gaussian(400)
    assert all(0.8 < value < 1.2 for value in means(real, gaussian(400)).values())
    narrow = means(real, gaussian(400, scale=0.1))
    assert narrow["precision"] == 1 and narrow["recall"] < 0.1 and narrow["coverage"] < 0.5
    elsewhere = means(real, gaussian(400, mean=50))
    assert set(elsewhere.values()) == {0.0}


def test_precision_and_recall_by_hand():
    real, made = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [9.0], [9.5]])
    found = metrics.precision_recall(real, made, k=1)  # radii 1, 1, 2 and 8.5, 0.5, 0.5
    assert found["precision"].tolist() == [1, 0, 0] and found["density"].tolist() == [2, 0, 0]
    assert found["recall"].tolist() == [1, 1, 1] and found["coverage"].tolist() == [1, 1, 0]


def test_a_copy_of_a_picture_that_is_there_often_is_near_it():
    real = np.vstack([np.zeros((8, 4)), gaussian(8, mean=50)])  # Eight equal pictures have neighborhoods of no size.
    found = means(real, np.zeros((7, 4)))
    assert found["precision"] == 1 and found["recall"] == found["coverage"] == 0.5


def test_intervals_of_recall_and_coverage_are_over_prompts():
    """With one picture for each prompt, few prompts give wide intervals, however many reference pictures there are."""
    random = np.random.default_rng(3)
    real, centers = random.standard_normal((2000, 2)), random.standard_normal((400, 2))
    found = [
        metrics.precision_recall_intervals(real, centers[i : i + 20], np.arange(20)) for i in range(0, len(centers), 20)
    ]
    for name in ("recall", "coverage"):
        intervals = [one[name] for one in found]
        spread = np.std([one.value for one in intervals])
        assert 2 * spread < np.mean([one.high - one.low for one in intervals]) < 6 * spread  # 4 spreads hold 95%
        assert all(0 <= one.low <= one.value <= one.high <= 1 for one in intervals)
    values = metrics.precision_recall(real, centers[:20])
    assert {n: one.value for n, one in found[0].items()} == pytest.approx({n: v.mean() for n, v in values.items()})


def test_recall_and_coverage_of_samples_by_hand():
    around = np.array([[False, True, False], [True, False, False], [True, True, False]])  # (real, made)
    of_made = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
    of_real = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    assert metrics._shares(around, of_real, of_made).tolist() == pytest.approx([2 / 3, 2 / 3, 0])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_interval_of_the_kernel_distance_of_few_pictures_is_finite(count):
    found = metrics.kernel_interval(gaussian(count), gaussian(count))
    assert np.isfinite([found.low, found.value, found.high]).all()


def test_the_rank_of_what_was_asked_is_by_cosine():
    text = np.eye(3)
    image = np.array([[5.0, 1, 0], [0, 0.1, 0.05], [0, 1, 0]])
    assert metrics.rank_of_asked(image, text, np.array([0, 1, 2])).tolist() == [0, 0, 1]


def test_diversity_by_prompt():
    made = np.array([[0.0], [2.0], [7.0], [7.0], [1.0]])
    assert metrics.diversity(made, np.array([0, 0, 1, 1, 2])).tolist() == [2.0, 0.0]


def test_novelty_is_relative_to_distances_between_training_pictures():
    training = np.array([[1.0], [4.0], [7.0]])
    made = np.array([[0.0], [10.0], [4.0]])
    assert metrics.novelty(made, training).tolist() == [1 / 3, 1.0, 0.0]
    assert metrics.novelty(made, np.vstack([training] * 2)).tolist() == [1 / 3, 1.0, 0.0]  # Copies change nothing.
    with pytest.raises(ValueError, match="2 different pictures, got 1"):
        metrics.novelty(made, training[[0, 0]])
    assert "novelty" not in figures.compare(training[[0, 0]], made, np.arange(3), samples=2)


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


def test_the_pictures_of_one_prompt_are_drawn_together():
    prompt = np.repeat(np.arange(20), 10)
    values = np.random.default_rng(0).standard_normal(20)[prompt]  # all of a prompt are alike: 20 facts, not 200
    alone = metrics.bootstrap(lambda x: float(x.mean()), values)
    together = metrics.bootstrap(lambda x: float(x.mean()), values, groups=(prompt,))
    assert together.high - together.low == pytest.approx(np.sqrt(10) * (alone.high - alone.low), rel=0.2)


def test_an_interval_holds_a_figure_that_is_biased_for_few_pictures():
    found = metrics.bootstrap(metrics.frechet, gaussian(40, length=8), gaussian(40, length=8), samples=50, biased=True)
    assert found.low < found.value < found.high


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


def test_node_is_asked_for_when_it_is_missing_and_a_damaged_model_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "dist/models/inception_v3"
    folder.mkdir(parents=True)
    (folder / "model.min.js").touch()

    def missing(*_: object, **__: object) -> SimpleNamespace:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(ValueError, match="needs Node"):
        inception.load_inception(tmp_path)
    entry = {"name": "conv/kernel", "shape": [9], "quantization": {"dtype": "uint8", "scale": 1, "min": 0}}
    for content in ({"layers": [], "weights": [entry], "data": "AAAA"}, {"weights": [], "data": ""}, []):
        done = SimpleNamespace(stdout=json.dumps(content))
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(ValueError, match=f"{tmp_path}: the model of .* is damaged"):
            inception.load_inception(tmp_path)


def test_ranks_do_not_depend_on_how_many_pictures_are_compared_at_once(monkeypatch):
    random = np.random.default_rng(0)
    image, text, asked = random.normal(size=(50, 8)), random.normal(size=(20, 8)), random.integers(0, 20, 50)
    whole = metrics.rank_of_asked(image, text, asked)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    assert np.array_equal(metrics.rank_of_asked(image, text, asked), whole) and len(set(whole)) > 5


def test_the_text_score_is_the_mean_cosine_with_the_own_prompt():
    class Reader:
        def texts(self, texts):
            return np.array([[2.0, 0.0] if text == "right" else [0.0, 1.0] for text in texts], np.float32)

    made, prompt = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 5.0]], np.float32), np.array([0, 0, 1])
    asked = figures.ask(["right", "up"], [], [])
    found = figures.retrieve(Reader(), made, prompt, asked, samples=5)
    assert found["text score"].value == pytest.approx((1 + 0.5**0.5 + 1) / 3)
    assert found["top 1"].value == 1  # The second picture is as near to both texts.


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [("cpu", {"avx512_bf16"}, "no"), ("cpu", {"avx512_bf16", "amx_bf16"}, "bf16"), ("cuda", set(), "bf16")],
)
def test_bfloat16_trains_faster_on_gpus_and_with_matrix_instructions(device, flags, expected, monkeypatch):
    monkeypatch.setattr(devices, "cpu_flags", lambda: flags)
    assert devices.fastest_precision(torch.device(device)) == expected
