"""The safety checker: what it sees, what becomes of flagged pictures, and that nothing passes by an error."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiue_runtime import BundleError, Cancelled, InferenceError, Pipeline, RequestError
from tiue_runtime.bundle import Bundle, MemoryUse, SafetyChecker, write_bundle
from tiue_runtime.noise import gaussian
from tiue_runtime.repeating import load_for
from tiue_runtime.safety import blurred, prepare
from tiue_runtime.saving import read_record
from tiue_runtime.tools.cli import main

HEART = "a red heart"
LIMIT = np.float32(0.3)  # in make_tiny_bundle.py
SEEDS = 8


@pytest.fixture(scope="module")
def checked():
    return Path(__file__).parent / "data" / "checked"


@pytest.fixture
def checking(checked):
    return Pipeline.load(checked, device="cpu")


@pytest.fixture
def changed(checked, tmp_path):
    """changed(**fields) returns a copy of the bundle with other fields of its manifest."""

    def change(graph=None, **fields):
        copy = Path(shutil.copytree(checked, tmp_path / "changed", dirs_exist_ok=True))
        if graph is not None:
            (copy / "safety_checker.onnx").write_bytes(graph)
        write_bundle(copy, replace(Bundle.load(checked).manifest, files={}, **fields))
        return copy

    return change


def brightness(picture):
    """Return the mean of what the checker sees, in closed form up to the filter."""
    return prepare(picture, SafetyChecker(6, 4, "bicubic")).mean()


def gray(level, size=(12, 8)):
    return Image.new("RGB", size, (level,) * 3)


# What it sees.


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (6, 6), (300, 7), (7, 300), (1, 1)])
@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_any_picture_becomes_a_square(size, name):
    made = prepare(gray(51, size), SafetyChecker(6, 4, name))
    assert made.shape == (1, 3, 4, 4) and made.dtype == np.float32 and made.flags.c_contiguous
    np.testing.assert_allclose(made, 51 / 127.5 - 1, atol=1e-6)


def test_the_square_is_the_center_and_colors_come_first():
    pixels = np.zeros((5, 9, 3), dtype=np.uint8)
    pixels[1:4, 3:6] = 0, 128, 255
    made = prepare(Image.fromarray(pixels), SafetyChecker(5, 3, "bicubic"))  # The size stays.
    np.testing.assert_allclose(made[0], np.array([-1, 128 / 127.5 - 1, 1]).repeat(9).reshape(3, 3, 3), atol=1e-6)


def test_a_blurred_picture_shows_blots():
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 2, (32, 32, 1)), np.ones((8, 8, 3))).astype(np.uint8) * 255
    made = np.asarray(blurred(Image.fromarray(pixels)), dtype=float)
    assert made.shape == pixels.shape
    assert made.std() < pixels.std() / 4
    assert abs(np.diff(made[:, :, 0], axis=1)).max() < 4


# What becomes of flagged pictures.


def test_flagged_pictures_are_blurred_and_others_are_not_touched(checking, checked):
    plain = Pipeline.load(checked, device="cpu", safety_checker=False)
    expected, made = (p(HEART, num_images=SEEDS, seed=1) for p in (plain, checking))
    flags = tuple(bool(brightness(picture) > LIMIT) for picture in expected.images)
    assert made.flagged == flags and 0 < sum(flags) < SEEDS
    assert tuple(record.flagged for record in made.records) == flags
    for before, after, flag in zip(expected.images, made.images, flags, strict=True):
        assert after.tobytes() == (blurred(before) if flag else before).tobytes()
    assert expected.flagged == () and {record.flagged for record in expected.records} == {None}


def test_arrays_are_the_same_pictures(checking):
    pictures = checking(HEART, num_images=SEEDS, seed=1)
    arrays = checking(HEART, num_images=SEEDS, seed=1, output_type="np")
    assert arrays.flagged == pictures.flagged and any(arrays.flagged)
    assert arrays.images.dtype == np.float32
    for array, picture in zip(arrays.images, pictures.images, strict=True):
        np.testing.assert_array_equal(np.round(array * 255), np.asarray(picture))


def test_latents_are_not_checked_and_their_decoding_is(checking):
    latents = checking(HEART, num_images=SEEDS, seed=1, output_type="latent")
    assert latents.flagged == ()
    expected = checking(HEART, num_images=SEEDS, seed=1)
    decoded = checking.decode(latents.images)
    assert [p.tobytes() for p in decoded] == [p.tobytes() for p in expected.images]
    np.testing.assert_array_equal(np.round(checking.decode(latents.images, output_type="np") * 255), decoded)


def test_exact_previews_are_checked(checking):
    made, previews = checking(HEART, seed=flagged_seed(checking)), []
    checking(
        HEART,
        seed=made.seeds[0],
        callback=lambda p: previews.append(p.preview(exact=True)) if p.latents is not None else None,
    )
    assert previews[-1].tobytes() == made.images[0].tobytes()


def flagged_seed(pipe):
    return next(s for s in range(1, 20) if pipe(HEART, seed=s).flagged == (True,))


@pytest.mark.parametrize("memory", ["parallel", "partial", "sequential", "low"])
def test_every_memory_mode_checks(checking, checked, memory):
    expected = checking(HEART, num_images=2, seed=1, memory="sequential")
    with Pipeline.load(checked, device="cpu", memory=memory) as pipe:
        made = pipe(HEART, num_images=2, seed=1)
        assert made.flagged == expected.flagged
        loaded = [graph.name for graph in pipe.graphs if graph.loaded]
        assert loaded == ([] if memory == "low" else [graph.name for graph in pipe.graphs])
        assert "safety_checker" in [graph.name for graph in pipe.graphs]


def test_it_is_the_last_stage_with_a_step_for_each_picture(checking):
    seen = []
    made = checking(HEART, num_images=3, seed=1, memory="parallel", callback=seen.append)
    stages = [(p.stage, p.step, p.steps) for p in seen]
    assert stages[-4:] == [("vae_decoder", 1, 1), *(("safety_checker", i, 3) for i in (1, 2, 3))]
    assert seen[-1].fraction == pytest.approx(1) and seen[-2].fraction < 1
    assert made.timings["safety_checker"] > 0


def test_a_request_stops_during_the_check(checking):
    with pytest.raises(Cancelled, match="safety_checker, 1 of 3"):
        checking(HEART, num_images=3, seed=1, callback=lambda p: p.stage == "safety_checker")


def test_it_counts_as_memory_that_is_held(changed, monkeypatch):
    memory = {"portable": {"safety_checker": MemoryUse(1000.0, 0.0)}}
    pipe = Pipeline.load(changed(memory=memory), device="cpu")
    pipe(HEART, num_images=3, seed=1)
    budget = pipe.graphs.budget
    monkeypatch.setattr("tiue_runtime.budget.free_memory", lambda _: 0)
    assert budget.fits("safety_checker", 1, 1) == pipe.graphs.safety_checker.keeps
    pipe.graphs.unload(pipe.graphs.safety_checker)
    assert not budget.fits("safety_checker", 1, 1)


# Switching it off, and errors.


def test_switched_off_it_is_not_even_loaded(changed, checked):
    path = changed(graph=b"no graph")
    pipe = Pipeline.load(path, device="cpu", safety_checker=False)
    assert not pipe.safety_checker and [graph.name for graph in pipe.graphs][-1] == "vae_decoder"
    assert pipe(HEART, seed=1).flagged == ()
    with pytest.raises(BundleError, match="safety_checker"):
        Pipeline.load(path, device="cpu")


def test_pipelines_with_and_without_it_do_not_share(checked):
    first, second, off = (Pipeline.load(checked, device="cpu", safety_checker=on) for on in (True, True, False))
    assert first.graphs is second.graphs is not off.graphs
    assert first.safety_checker and not off.safety_checker


def test_a_bundle_without_one_checks_nothing(tiny):
    pipe = Pipeline.load(tiny, device="cpu")
    assert not pipe.safety_checker and pipe(HEART, seed=1).flagged == ()
    with pytest.raises(RequestError, match="safety_checker: expected True or False, got 'no'"):
        Pipeline.load(tiny, device="cpu", safety_checker="no")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_an_error(changed, checked, value):
    graph = (checked / "safety_checker.onnx").read_bytes()
    assert graph.count(LIMIT.tobytes()) == 1
    pipe = Pipeline.load(changed(graph=graph.replace(LIMIT.tobytes(), np.float32(value).tobytes())), device="cpu")
    with pytest.raises(InferenceError, match="score"):
        pipe(HEART, seed=1)


def test_a_graph_that_is_no_safety_checker(changed, checked):
    path = changed(graph=(checked / "vae_decoder.onnx").read_bytes())
    with pytest.raises(BundleError, match="safety_checker: expected inputs among image, got latents"):
        Pipeline.load(path, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"safety_checker": None}, "safety_checker: expected an object if variants have the graph"),
        ({"safety_checker": SafetyChecker(4, 6, "bicubic")}, r"safety_checker\.crop: expected at most .*\(4\), got 6"),
        ({"safety_checker": SafetyChecker(6, 4, "cubic")}, r"safety_checker\.filter: expected one of nearest"),
        ({"safety_checker": SafetyChecker(0, 0, "bicubic")}, r"safety_checker\.resize: expected a number >= 1"),
        ({"variants": {"portable": "tiny"}}, "safety_checker: expected an object if variants have the graph"),
    ],
)
def test_manifests_that_contradict_themselves(changed, tiny, change, message):
    if "variants" in change:
        change = {"variants": Bundle.load(tiny).manifest.variants}
    with pytest.raises(BundleError, match=message):
        changed(**change)


# Files and commands.


def test_a_file_says_it_and_is_repeated(checking, checked, tmp_path):
    seed = flagged_seed(checking)
    checking(HEART, seed=seed).save(tmp_path / "flagged.png")
    record = read_record(tmp_path / "flagged.png")
    assert record.flagged is True
    assert json.loads(record.to_json())["flagged"] is True
    with load_for(record, checked) as pipe:
        assert pipe.repeat(tmp_path / "flagged.png").flagged == (True,)
    off = Pipeline.load(checked, device="cpu", safety_checker=False)
    with pytest.warns(UserWarning, match="flagged was True, now None"):
        off.repeat(tmp_path / "flagged.png")


def test_a_record_does_not_switch_it_off(checking, checked, tmp_path):
    off = Pipeline.load(checked, device="cpu", safety_checker=False)
    off(HEART, seed=flagged_seed(checking)).save(tmp_path / "plain.png")
    with load_for(read_record(tmp_path / "plain.png"), checked) as pipe:
        assert pipe.safety_checker
        with pytest.warns(UserWarning, match="flagged was None, now True"):
            pipe.repeat(tmp_path / "plain.png")


@pytest.mark.parametrize("value", ['"yes"', "1", "[]"])
def test_a_record_with_another_value(checking, value):
    (record,) = checking(HEART, seed=1).records
    text = record.to_json().replace('"flagged": true', f'"flagged": {value}')
    text = text.replace('"flagged": false', f'"flagged": {value}')
    from tiue_runtime.record import parse_record

    with pytest.raises(RequestError, match="flagged: expected true or false"):
        parse_record(text.encode())


def test_the_commands_say_it(checking, checked, tmp_path, capsys):
    seed = str(flagged_seed(checking))
    flags = ["generate", HEART, "--bundle", str(checked), "--device", "cpu", "--seed", seed]
    assert main([*flags, "-o", str(tmp_path / "a.png")]) == 0
    assert "flagged by the safety checker, and blurred" in capsys.readouterr().out
    assert main([*flags, "-o", str(tmp_path / "b.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flagged"] is True
    assert main([*flags, "-o", str(tmp_path / "c.png"), "--no-safety-checker"]) == 0
    assert "flagged" not in capsys.readouterr().out
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    assert main(["info", "--bundle", str(checked)]) == 0
    assert "safety checker" in capsys.readouterr().out


def test_embeddings_and_given_noise_are_checked(checking):
    made = checking(prompt_embeds=checking.encode(HEART), latents=gaussian(1, (1, 4, 4, 6)))
    assert made.flagged == checking(HEART, latents=gaussian(1, (1, 4, 4, 6))).flagged != ()
