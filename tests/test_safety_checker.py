"""The safety checker at export: it flags what diffusers flags, from transformers' preparation to the bundle."""

import importlib.util
import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch
from PIL import Image
from PIL.Image import Resampling
from safetensors.torch import load_file, save_file
from tiue_runtime import Pipeline, bundle
from tiue_runtime.safety import blurred, prepare
from tolerances import REORDERED

from export import assemble
from export.errors import ExportError
from export.export_options import Options
from export.onnx import main
from export.plan import make_plan
from export.source import load_source
from export.trace import safety_checker_graph
from tiue.checkpoint import Student, save_student
from tiue.components import ComponentsError, load_components, load_safety_checker
from tiue.safety_checker import Scorer, score

PICTURES = 60


@pytest.fixture
def directory(tmp_path):
    path = tiny.save_pipeline(tiny.sd15(), tmp_path / "base")
    tiny.save_safety_checker(path)
    return path


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A safety checker as an export loads it."""
    path = tiny.save_pipeline(tiny.sd15(), tmp_path_factory.mktemp("loaded"))
    tiny.save_safety_checker(path)
    return load_safety_checker(path)


def pictures():
    """Return smooth pictures of many sizes."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(PICTURES):
        few = rng.integers(0, 256, (*rng.integers(1, 6, 2), 3), dtype=np.uint8)
        made.append(Image.fromarray(few).resize(tuple(map(int, rng.integers(8, 64, 2))), Resampling.BICUBIC))
    return made


def test_it_flags_what_diffusers_flags(loaded, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers.pipelines.stable_diffusion.safety_checker"), "warning", print)
    given = pictures()
    pixels = loaded.processor(given, return_tensors="pt")["pixel_values"]
    for special in (0.3, 2.0, -2.0):  # some pictures get the adjustment, none, all
        loaded.module.special_care_embeds_weights.fill_(special)
        _, expected = loaded.module(pixels, [np.zeros((1, 1, 3)) for _ in given])
        made = score(loaded, given)
        assert [bool(value > 0) for value in made] == expected
        assert 0 < sum(expected) < PICTURES
    loaded.module.special_care_embeds_weights.fill_(0.3)


@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_pictures_are_prepared_as_by_transformers(loaded, name):
    """Level for level: the rest is scale and shift in float32."""
    processor = type(loaded.processor)(
        size={"shortest_edge": 17}, crop_size=12, resample=Resampling[name.upper()], image_mean=[0.1, 0.5, 0.9]
    )
    scorer = Scorer(replace(loaded, processor=processor))
    for picture in pictures():
        expected = processor(picture, return_tensors="np")["pixel_values"][0]
        made = prepare(picture, bundle.SafetyChecker(17, 12, name))[0] * scorer.scale.numpy() + scorer.shift.numpy()
        np.testing.assert_allclose(made, expected, atol=REORDERED)


def test_the_graph_scores_like_the_module(loaded, tmp_path):
    graph = safety_checker_graph(loaded)
    ir.save(graph, tmp_path / "checker.onnx")
    session = ort.InferenceSession(tmp_path / "checker.onnx")
    images = np.concatenate([prepare(picture, bundle.SafetyChecker(14, 12, "bicubic")) for picture in pictures()])
    (made,) = session.run(["score"], {"image": images})
    np.testing.assert_allclose(made, score(loaded, pictures()).numpy(), atol=REORDERED)
    assert made.shape == (PICTURES,)


# A whole export.


def test_a_bundle_with_a_safety_checker(directory, tmp_path, traced_once):
    out = tmp_path / "out"
    has_spandrel = importlib.util.find_spec("spandrel") is not None  # One export tests both optional graphs.
    save_file(tiny.upscaler(), tmp_path / "compact.safetensors")
    upscaler = ["--upscaler", str(tmp_path / "compact.safetensors")] if has_spandrel else []
    assert main(["--ckpt", str(directory), "--steps", "4", "--out", str(out), *upscaler]) == 0
    found = bundle.Bundle.load(out)
    assert found.manifest.safety_checker == bundle.SafetyChecker(14, 12, "bicubic")
    assert found.manifest.graphs[4:] == ("safety_checker", "upscaler")[: 2 if has_spandrel else 1]
    assert "flagged pictures are blurred" in (out / "README.md").read_text()

    plain = Pipeline.load(out, device="cpu", safety_checker=False)("a red heart", num_images=12, seed=1)
    expected = [bool(value > 0) for value in score(load_safety_checker(directory), plain.images)]
    made = Pipeline.load(out, device="cpu")("a red heart", num_images=12, seed=1)
    assert list(made.flagged) == expected and 0 < sum(expected) < 12
    for before, after, flag in zip(plain.images, made.images, expected, strict=True):
        assert after.tobytes() == (blurred(before) if flag else before).tobytes()
    if has_spandrel:
        assert found.manifest.upscaler == bundle.Upscaler(2)
        assert "RealESRGAN Compact, compact.safetensors, sha256" in found.manifest.created_from["upscaler"]
        enlarged = Pipeline.load(out, device="cpu")("a red heart", seed=1, upscale=2).images[0]
        assert enlarged.size == tuple(2 * side for side in made.images[0].size)


# What is loaded, and what is left out.


def test_only_an_export_loads_it_and_leaving_it_out_is_said(directory):
    with pytest.warns(UserWarning, match="safety_checker is left out: pictures are not checked"):
        assert load_components(directory).safety_checker is None
    with pytest.warns(UserWarning, match="safety_checker is left out: pictures are not checked"):
        assert load_source(directory, safety_checker=False).components.safety_checker is None
    assert load_source(directory).components.safety_checker is not None


@pytest.mark.filterwarnings("always:.*safety_checker is left out")
def test_the_command_leaves_it_out_on_request_and_records_that(directory, monkeypatch, capsys):
    exported = []
    monkeypatch.setattr(assemble, "export_bundle", lambda student, _, options, *__: exported.append((student, options)))
    assert main(["--ckpt", str(directory), "--no-safety-checker"]) == 0
    assert "safety_checker is left out: pictures are not checked" in capsys.readouterr().err
    assert main(["--ckpt", str(directory)]) == 0
    manifests = [make_plan(*one).manifest for one in exported]
    assert [manifest.created_from.get("safety_checker") for manifest in manifests] == ["left out on request", None]
    assert ["safety_checker" in manifest.graphs for manifest in manifests] == [False, True]


def test_a_model_without_one(tmp_path):
    directory = tiny.save_pipeline(tiny.sd15(), tmp_path / "base")
    student = load_source(directory)
    assert student.components.safety_checker is None
    assert "safety_checker" not in make_plan(student, Options()).manifest.graphs
    with pytest.raises(ComponentsError, match="base has no safety checker"):
        load_source(directory, safety_checker=str(directory))


def test_a_student_takes_one_from_a_pipeline(directory, tmp_path):
    save_student(tmp_path / "student.safetensors", Student(tiny.sd15(), 751, {1: [751]}, "tiny-teacher"))
    assert load_source(tmp_path / "student.safetensors").components.safety_checker is None
    found = load_source(tmp_path / "student.safetensors", safety_checker=str(directory)).components.safety_checker
    expected = tiny.save_safety_checker(directory)
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in found.module.state_dict().items())


def test_unet_weights_take_the_bases(directory, tmp_path):
    save_file(tiny.unet().state_dict(), tmp_path / "unet.safetensors")
    assert load_source(tmp_path / "unet.safetensors", base=directory).components.safety_checker is not None


# The files of 2022.


def test_weights_and_settings_of_2022(directory):
    """A feature extractor of the old class with whole numbers for sizes; weights in float16 with their positions."""
    path = directory / "safety_checker" / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(tensors, path, {"format": "pt"})
    extractor = directory / "feature_extractor" / "preprocessor_config.json"
    own = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 14, "crop_size": 12}
    kept = {key: value for key, value in json.loads(extractor.read_text()).items() if not key.startswith("image")}
    extractor.write_text(json.dumps(kept | own))
    tiny.edit_json(directory / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    checker = load_safety_checker(directory)
    assert (checker.processor.size, checker.processor.crop_size["width"]) == ({"shortest_edge": 14}, 12)
    assert checker.module.dtype == torch.float32


# Wrong and incomplete directories.


def without(name):
    def change(directory):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def put(**values):
    def change(directory):
        tiny.edit_json(directory / "feature_extractor" / "preprocessor_config.json", **values)

    return change


def as_pickle(directory):
    path = directory / "safety_checker" / "model.safetensors"
    torch.save(load_file(path), directory / "safety_checker" / "pytorch_model.bin")
    path.unlink()


def with_tensors(**tensors):
    def change(directory):
        path = directory / "safety_checker" / "model.safetensors"
        save_file({**load_file(path), **tensors}, path, {"format": "pt"})

    return change


OFF = r"\(`safety_checker` off leaves it out\)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("safety_checker"), f"safety_checker/config.json is missing {OFF}"),
        (without("safety_checker/config.json"), f"safety_checker/config.json is missing {OFF}"),
        (without("safety_checker/model.safetensors"), f"has no model.safetensors.* {OFF}"),
        (as_pickle, f"a pickle, which is never loaded.* {OFF}"),
        (without("feature_extractor"), f"feature_extractor/preprocessor_config.json is missing {OFF}"),
        (with_tensors(concept_embeds=torch.ones(16, 8)), f"a wrong shape for concept_embeds.* {OFF}"),
        (with_tensors(extra=torch.ones(1)), f"an unexpected tensor extra.* {OFF}"),
        (with_tensors(concept_embeds=torch.full((17, 8), torch.nan)), "concept_embeds holds infinity or NaN"),
        (put(do_center_crop=False), f"do_center_crop is False: expected true {OFF}"),
        (put(do_normalize=None), f"do_normalize is None: expected true {OFF}"),
        (put(size={"height": 14, "width": 14}), "expected a shortest_edge of at least the square"),
        (put(crop_size={"height": 12, "width": 10}), "expected a shortest_edge of at least the square"),
        (put(size={"shortest_edge": 11}), "expected a shortest_edge of at least the square"),
        (put(size={"shortest_edge": 10**9}), "expected a shortest_edge of at least the square"),
        (put(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}), "16 pixels, but .* takes 12"),
        (put(size="large"), "preprocessor_config.json cannot be loaded"),
        (put(resample=9), "resample is 9: expected one of Pillow's filters"),
        (put(image_mean=[0.5]), r"image_mean is \[0.5\]: expected three numbers"),
        (put(image_std=[1, 0, 1]), "rescale_factor .* and image_std"),
        (put(rescale_factor="1"), "rescale_factor '1'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(directory, change, message):
    change(directory)
    with pytest.raises((ComponentsError, ExportError), match=message):
        load_source(directory)


def test_another_class(directory):
    tiny.edit_json(directory / "model_index.json", safety_checker=["other", "OtherChecker"])
    with pytest.raises(ComponentsError, match=f"OtherChecker is not supported: expected StableDiffusion.* {OFF}"):
        load_source(directory)


def test_the_command_names_the_flag(directory, capsys):
    shutil.rmtree(directory / "safety_checker")
    assert main(["--ckpt", str(directory)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("safety_checker/config.json is missing (--safety-checker off leaves it out)")
