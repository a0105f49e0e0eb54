"""The upscaler: larger pictures on request, in tiles, with a record of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiue_runtime import BundleError, Cancelled, OutOfMemoryError, Pipeline, RequestError
from tiue_runtime.bundle import Bundle, MemoryUse, Upscaler, write_bundle
from tiue_runtime.ort.graph import Graph
from tiue_runtime.repeating import load_for
from tiue_runtime.saving import read_record
from tiue_runtime.tools.cli import main
from tiue_runtime.upscale import plans

HEART = "a red heart"
SCALE = 3


@pytest.fixture(scope="module")
def upscaled():
    return Path(__file__).parent / "data" / "upscaled"


@pytest.fixture
def pipe(upscaled):
    return Pipeline.load(upscaled, device="cpu", safety_checker=False)


def larger(array):
    """Return what the graph makes of pictures (B, H, W, 3) in [0, 1], in closed form: inverted, pixels repeated."""
    return (1 - np.asarray(array)).repeat(SCALE, axis=-3).repeat(SCALE, axis=-2)


def levels(pictures):
    return np.stack([np.asarray(picture, dtype=np.float64) for picture in pictures])


@pytest.mark.parametrize("memory", ["parallel", "sequential", "low"])
def test_pictures_are_enlarged_on_request(pipe, memory):
    plain = pipe(HEART, num_images=2, seed=1, output_type="np")
    made = pipe(HEART, num_images=2, seed=1, output_type="np", upscale=SCALE, memory=memory)
    assert made.images.shape == (2, 8 * SCALE, 12 * SCALE, 3) and (made.upscale, plain.upscale) == (SCALE, None)
    np.testing.assert_allclose(made.images, larger(plain.images), atol=1e-6)
    pictures = pipe(HEART, num_images=2, seed=1, upscale=SCALE).images
    assert abs(levels(pictures) - made.images * 255).max() <= 0.5 + 1e-3
    assert pipe(HEART, seed=1, upscale=1).images[0].size == (12, 8)


def test_large_pictures_are_enlarged_in_tiles(pipe):
    options = {"seed": 1, "height": 300, "width": 520, "output_type": "np", "memory": "sequential", "vae_tiling": False}
    plain, seen = pipe(HEART, **options).images, []
    made = pipe(HEART, **options, upscale=SCALE, callback=seen.append)
    np.testing.assert_allclose(made.images, larger(plain), atol=1e-5)
    assert made.records[0].upscale_tile == (256, 256) and made.tile is None
    tiles = [(p.step, p.steps) for p in seen if p.stage == "upscaler"]
    assert tiles == [(i + 1, 6) for i in range(6)]
    assert seen[-1].stage == "upscaler" and seen[-1].fraction == pytest.approx(1)
    assert made.timings["upscaler"] > 0


@pytest.mark.parametrize(
    "shape", [(1, 3, 8, 12), (2, 3, 256, 256), (1, 3, 260, 8), (1, 3, 1024, 768), (1, 3, 100, 300)]
)
def test_tiles_have_a_fixed_size_and_then_smaller_ones(upscaled, shape):
    manifest = Bundle.load(upscaled).manifest
    ways = plans(manifest, shape)
    assert (ways[0].height, ways[0].width) == (min(256, shape[2]), min(256, shape[3]))
    sizes = [way.height * way.width for way in ways]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert all(way.rows == 1 and way.tiled == ((way.height, way.width) != shape[2:]) for way in ways)


def test_it_is_loaded_when_it_is_first_needed(pipe):
    assert not pipe.graphs.upscaler.loaded
    pipe(HEART, seed=1)
    assert not pipe.graphs.upscaler.loaded
    pipe(HEART, seed=1, upscale=SCALE)
    assert pipe.graphs.upscaler.loaded


def test_flagged_pictures_stay_blurred(upscaled):
    with Pipeline.load(upscaled, device="cpu") as pipe:
        small = pipe(HEART, num_images=8, seed=1, output_type="np")
        made = pipe(HEART, num_images=8, seed=1, output_type="np", upscale=SCALE)
    assert made.flagged == small.flagged and 0 < sum(made.flagged) < 8
    np.testing.assert_allclose(made.images, larger(small.images), atol=1e-6)


def test_latents_are_decoded_and_enlarged(pipe):
    latents = pipe(HEART, seed=1, output_type="latent").images
    made = pipe.decode(latents, output_type="np", upscale=SCALE)
    np.testing.assert_allclose(made, larger(pipe.decode(latents, output_type="np")), atol=1e-6)


def test_exact_previews_have_the_size_before(pipe):
    sizes = []

    def callback(progress):
        sizes.append(progress.latents is not None and progress.preview(exact=True).size)

    pipe(HEART, seed=1, upscale=SCALE, callback=callback)
    assert set(sizes) == {False, (12, 8)}


# Memory.


def test_smaller_tiles_follow_where_memory_runs_out(pipe, monkeypatch):
    run = Graph.__call__

    def limited(graph, feed, **options):
        if graph.name == "upscaler" and feed["image"].shape[2] > 64:
            raise OutOfMemoryError("bad allocation")
        return run(graph, feed, **options)

    monkeypatch.setattr(Graph, "__call__", limited)
    options = {"seed": 1, "height": 200, "width": 200, "output_type": "np", "vae_tiling": False}
    with pytest.warns(UserWarning, match="bad allocation"):
        made = pipe(HEART, **options, upscale=SCALE)
    assert made.records[0].upscale_tile == (64, 64)
    np.testing.assert_allclose(made.images, larger(pipe(HEART, **options).images), atol=1e-5)


def test_the_estimate_chooses_smaller_tiles(upscaled, tmp_path, monkeypatch):
    path = Path(shutil.copytree(upscaled, tmp_path / "copy"))
    memory = {"portable": {"upscaler": MemoryUse(1000.0, 0.0)}}
    write_bundle(path, replace(Bundle.load(path).manifest, memory=memory, files={}))
    pipe = Pipeline.load(path, device="cpu", safety_checker=False)
    monkeypatch.setattr("tiue_runtime.budget.free_memory", lambda _: 1000 * 64 * 64 / 0.8 + 1)
    with pytest.warns(UserWarning, match="upscaler would run out of memory on cpu, by the bundle's estimate"):
        made = pipe(HEART, seed=1, height=200, width=200, upscale=SCALE)
    assert made.records[0].upscale_tile == (64, 64)


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upscale": 2}, "upscale: bundle upscaled enlarges by 3, got 2"),
        ({"upscale": 0}, "upscale: bundle upscaled enlarges by 3, got 0"),
        ({"upscale": -3}, "upscale: bundle upscaled enlarges by 3, got -3"),
        ({"upscale": 1.5}, "upscale: expected an integer or None, got 1.5"),
        ({"upscale": True}, "upscale: expected an integer or None, got True"),
        ({"upscale": SCALE, "output_type": "latent"}, "upscale: pictures are enlarged, not latents"),
    ],
)
def test_another_factor_is_refused(pipe, options, message):
    with pytest.raises(RequestError, match=message):
        pipe(HEART, **options)


def test_a_bundle_without_one(tiny):
    pipe = Pipeline.load(tiny, device="cpu")
    for call in (lambda: pipe(HEART, upscale=4), lambda: pipe.decode(np.zeros((1, 4, 4, 6), np.float32), upscale=4)):
        with pytest.raises(RequestError, match=r"upscale: bundle tiny has no upscaler; the exporter adds one"):
            call()


def test_an_enlarged_picture_that_memory_cannot_hold(pipe, monkeypatch):
    monkeypatch.setattr("tiue_runtime.budget.free_memory", lambda _: 2**26)
    pipe(HEART, seed=1, height=512, width=512, vae_tiling=False)
    with pytest.raises(RequestError, match="picture of 3072x3072 pixels need"):
        pipe(HEART, seed=1, height=1024, width=1024, upscale=SCALE)


def test_a_request_stops_between_tiles(pipe):
    with pytest.raises(Cancelled, match="upscaler, 2 of 6"):
        pipe(HEART, height=300, width=520, upscale=SCALE, callback=lambda p: p.stage == "upscaler" and p.step == 2)


@pytest.mark.parametrize("change", [{"upscaler": None}, {"upscaler": Upscaler(1)}, {"upscaler": Upscaler(17)}])
def test_manifests_that_contradict_themselves(upscaled, tmp_path, change):
    path = Path(shutil.copytree(upscaled, tmp_path / "copy"))
    with pytest.raises(BundleError, match="upscaler"):
        write_bundle(path, replace(Bundle.load(path).manifest, files={}, **change))


def test_a_wrong_factor_in_the_manifest(upscaled, tmp_path):
    path = Path(shutil.copytree(upscaled, tmp_path / "copy"))
    write_bundle(path, replace(Bundle.load(path).manifest, files={}, upscaler=Upscaler(2)))
    with pytest.raises(Exception, match=r"enlarged.*\(1, 3, 16, 24\)"):
        Pipeline.load(path, device="cpu")(HEART, upscale=2)


# Files and commands.


def test_files_say_it_and_are_repeated(pipe, upscaled, tmp_path):
    made = pipe(HEART, seed=1, upscale=SCALE)
    made.save(tmp_path / "a.png")
    pipe(HEART, seed=1, upscale=SCALE, output_type="np").save(tmp_path / "b.png")
    record = read_record(tmp_path / "a.png")
    assert (record.upscale, record.height, record.width) == (SCALE, 8, 12)
    assert "Hires upscale: 3" in record.parameters()
    assert read_record(tmp_path / "b.png") == record
    with load_for(record, upscaled, safety_checker=False) as again:
        assert again.repeat(tmp_path / "a.png").images[0].tobytes() == made.images[0].tobytes()


def test_the_commands(upscaled, tmp_path, capsys):
    flags = ["generate", HEART, "--bundle", str(upscaled), "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert main([*flags, "--upscale", "3"]) == 0
    assert "36x24" in capsys.readouterr().out
    assert main([*flags, "--upscale", "3", "--num-images", "2", "--grid"]) == 0
    assert "2x1 pictures" in capsys.readouterr().out
    named = [*flags[:-1], str(tmp_path / "{width}x{height}.png"), "--upscale", "3"]
    assert main(named) == 0
    with Image.open(tmp_path / "36x24.png") as picture:
        assert picture.size == (36, 24)
    assert main([*flags, "--upscale", "2"]) == 2
    assert "--upscale: bundle upscaled enlarges by 3, got 2" in capsys.readouterr().err
    assert main(["info", "--bundle", str(upscaled)]) == 0
    assert "--upscale 3" in capsys.readouterr().out
