"""`python -m evaluation` and `python -m evaluation.encoder`, end to end, with tiny networks."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiue_runtime import Pipeline
from tiue_runtime.noise import gaussian
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from evaluation import cli, features, figures, metrics
from evaluation.encoder import augment, contrastive, network, retrieval, sentences
from evaluation.encoder.__main__ import main as encoder_main
from evaluation.encoder.encoder_config import EncoderConfig, Shape
from evaluation.features import load_extractors
from evaluation.guidance import GuidanceConfig, compare_guidance
from evaluation.guidance import main as guidance_main
from evaluation.painters import bundle_painter, pipeline_painter, student_painter, torch_painter
from evaluation.reference import Reference, load_reference
from tiue.checkpoint import Student, load_student, save_student
from tiue.components import Components, decode_latents
from tiue.diffusion import Diffusion
from tiue.schedule import ddim_timesteps
from tiue.text_encoder import encode_text

CPU = torch.device("cpu")
BUNDLE = Path(__file__).parents[1] / "runtime/tests/data/tiny"
STYLES = ["noto", "flat", "noto classic"]
CONCEPTS = 12


@pytest.fixture(autouse=True)
def hashed_sentences(monkeypatch):
    """Stands for MiniLM: vectors that depend on the words."""

    def embed(self: object, texts: list[str]) -> torch.Tensor:
        del self
        seeds = [sum(ord(c) * (i + 1) for i, c in enumerate(text)) for text in texts]
        return torch.stack([torch.randn(384, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    monkeypatch.setattr(sentences.Sentences, "__init__", lambda *_: None)
    monkeypatch.setattr(sentences.Sentences, "__call__", embed)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small are faster without a second thread, and give the same sums everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings: a concept is a color, a style is a shape."""
    directory = tmp_path_factory.mktemp("drawings")
    random = np.random.default_rng(0)
    concept, style = np.repeat(np.arange(CONCEPTS), 3), np.tile(np.arange(3), CONCEPTS)
    colors = random.integers(0, 200, (CONCEPTS, 3), np.uint8)
    images = np.full((len(concept), 32, 32, 3), 255, np.uint8)
    for image, c, s in zip(images, concept, style, strict=True):
        image[4 + 4 * s : 28, 4:28] = colors[c]
    np.savez(directory / "drawings.npz", images=images, concept=concept, style=style, held_out=np.zeros(36, bool))
    captions = [[f"thing {i}", f"a thing {i}", f"gadget {i}"] for i in range(CONCEPTS)]
    (directory / "captions.json").write_text(json.dumps(captions))
    (directory / "styles.json").write_text(json.dumps(STYLES))
    return directory / "drawings.npz"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = Shape(resolution=16, widths=(8, 16), embedding=12, text_hidden=8)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    network.save_encoder(path, shape, network.Encoder(shape).state_dict())
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    components = tiny.sd15()
    timesteps = ddim_timesteps(components.scheduler_config, 2)
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_student(path, Student(components, timesteps[0], {2: timesteps}, base_model="tiny"))
    return path


def run(tmp_path: Path, archive: Path, *arguments: str) -> int:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("thing 1\ngadget 2, noto style\nsomething else\n")
    files = ["--prompts", str(prompts), "--reference", str(archive), "--out", str(tmp_path / "report.json")]
    return cli.main([*files, "--samples", "5", *arguments])


@pytest.mark.filterwarnings("ignore:the model knows no word")  # its names are invented
def test_a_bundle_is_evaluated_from_prompts_to_report(tmp_path, archive, encoder, capsys):
    options = ["--bundle", str(BUNDLE), "--features", f"emoji={encoder}", "--seeds", "3"]
    assert run(tmp_path, archive, *options, "--save", str(tmp_path / "pictures")) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["prompts"], report["pictures"], report["reference pictures"]) == (3, 9, 36)
    assert report["candidates"] == CONCEPTS + 1
    found = report["features"]["emoji"]
    assert found.keys() >= {"frechet", "kernel distance", "precision", "recall", "density", "coverage", "novelty"}
    assert found.keys() >= {"diversity", "top 1", "top 5", "text score", "styles", "evenness"}
    assert all(f["low"] <= f["value"] <= f["high"] for n, f in found.items() if n == "frechet")
    assert sum(found["pictures by style"].values()) == 6  # of the two prompts that name no style
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 9
    out = capsys.readouterr().out
    assert re.search(r"frechet +\S+ \(\S+ to \S+\)", out) and "noto classic" in out


def test_pictures_that_are_kept_are_a_reference_without_retrieval(tmp_path, archive, encoder, student):
    (tmp_path / "folder").mkdir()
    for i in range(7):
        Image.new("RGB", (20, 30), (30 * i, 0, 0)).save(tmp_path / f"folder/{i}.png")
    options = ["--student", str(student), "--features", f"emoji={encoder}", "--seeds", "2", "--reference-size", "16"]
    assert run(tmp_path, tmp_path / "folder", *options) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["reference pictures"] == 7 and report["candidates"] == 3
    assert "styles" not in report["features"]["emoji"]


PROMPTS, SEEDS = ["a red heart", "a blue star"], range(5, 8)


def test_every_prompt_of_a_bundle_has_the_same_seeds():
    made = bundle_painter(BUNDLE)(PROMPTS, SEEDS)
    pipeline = Pipeline.load(BUNDLE)
    alone = [pipeline(prompt, seed=seed).images[0] for prompt in PROMPTS for seed in SEEDS]
    assert (made == np.stack([np.asarray(image) for image in alone])).all()


@torch.no_grad()
def test_every_prompt_of_a_student_has_the_same_seeds(student):
    made = student_painter(student, CPU)(PROMPTS, SEEDS)
    loaded = load_student(student)
    noise = torch.from_numpy(gaussian(7, (4, 8, 8)))[None]
    latents = loaded.tiue()(noise, encode_text(loaded.components, PROMPTS[1:]))
    image = (decode_latents(loaded.components.vae, latents)[0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)
    assert abs(made[5] - image * 255).max() <= 1


def test_a_pipeline_is_sampled_as_diffusers_does(tmp_path):
    parts = tiny.sd15()
    directory = tiny.save_pipeline(parts, tmp_path / "teacher")
    made = pipeline_painter(directory, CPU, steps=3, guidance=2.0)(PROMPTS, range(1, 3))
    modules = {"unet": parts.unet, "vae": parts.vae, "text_encoder": parts.text_encoder, "tokenizer": parts.tokenizer}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**modules, **none, scheduler=DDIMScheduler.from_config(parts.scheduler_config))
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(gaussian(2, (4, 8, 8)))[None]
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    theirs = pipeline(PROMPTS[0], latents=noise, **options).images[0]
    assert abs(made[1] - theirs * 255).max() <= 1


class OffWithoutText(nn.Module):
    """The exact v network of a world with one picture, but 0.5 too high for the empty text."""

    def __init__(self, components: Components, picture: torch.Tensor):
        super().__init__()
        self.config, self._diffusion = components.unet.config, Diffusion(components.noise_schedule, CPU)
        self._picture, self._null = picture, encode_text(components, [""]).detach()

    def forward(self, z: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> SimpleNamespace:
        alpha, sigma = self._diffusion.scales(t)
        v = alpha * (z - alpha * self._picture) / sigma - sigma * self._picture
        off = (text == self._null).all((1, 2)).float()
        return SimpleNamespace(sample=v + 0.5 * off.view(-1, 1, 1, 1))


def test_the_error_of_a_guidance_scale_is_its_distance_from_the_samples(tmp_path):
    components = tiny.v_prediction()
    scheduler = components.scheduler_config | {"set_alpha_to_one": True}  # DDIM then ends at the picture itself.
    components = replace(components, scheduler_config=scheduler)
    picture = torch.randn(1, *components.geometry.latent_shape)
    components = replace(components, unet=OffWithoutText(components, picture))
    config = GuidanceConfig(guidance=1.0, scales=(1.0, 1.5, 3.0), samples=3, steps=3, batch=2)
    found = compare_guidance(components, PROMPTS, config)
    assert [len(timesteps) for timesteps in found] == [100, 150, 250, 250, 200]
    for errors in found.values():
        assert errors == pytest.approx([((1 - scale) * 0.5) ** 2 for scale in config.scales], abs=1e-4)


def test_guidance_is_compared_by_a_command(tmp_path, capsys):
    directory = tiny.save_pipeline(tiny.sd15(), tmp_path / "teacher")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    flags = ["--pipeline", str(directory), "--prompts", str(prompts), "--samples", "2", "--steps", "2"]
    assert guidance_main([*flags, "--scales", "1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| timesteps | guidance 1 | guidance 2 |" and len(lines) == 7
    assert all(line.count("**") == 2 for line in lines[2:])
    assert guidance_main([*flags, "--scales", "-1"]) == 2
    assert "--scales must be numbers of at least 0" in capsys.readouterr().err
    assert guidance_main([*flags, "--steps", "2000"]) == 2
    found = capsys.readouterr()
    assert found.out == "" and "2000" in found.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--features"),
        (["--features", "resnet=x"], "KIND=PATH"),
        (["--features", "emoji=absent.safetensors"], "absent.safetensors"),
        (["--features", "clip=absent"], "absent"),
        (["--seeds", "0"], "--seeds"),
        (["--features", "emoji=absent", "--out", "."], "--out: . is a directory"),
        (["--features", "emoji=absent", "--save", __file__], "is a file, expected a directory"),
        (["--features", "emoji=absent", "--guidance", "3"], "--guidance is a setting of pipelines"),
        (["--features", "emoji=absent", "--spacing", "trailing"], "--spacing is a setting of pipelines"),
    ],
)
def test_a_mistake_is_said_in_one_line(tmp_path, archive, student, capsys, arguments, said):
    assert run(tmp_path, archive, "--student", str(student), *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_too_few_pictures_are_refused_before_any_is_drawn(tmp_path, archive, encoder):
    reference = load_reference(archive)
    judges = cli.load_judges(reference, [f"emoji={encoder}"])
    config = cli.EvaluationConfig(features=(f"emoji={encoder}",), seeds=1)
    one = Reference(reference.pictures[:1], reference.concept[:1], reference.style[:1], reference.captions, STYLES)
    for prompts, given, name in ((["a cat"], reference, "prompts"), (["a cat", "a dog"], one, "reference")):
        with pytest.raises(ValueError, match=f"{name}: expected at least 2 pictures, got 1"):
            cli.evaluate(None, prompts, given, judges, config)
    with pytest.raises(ValueError, match=r"emoji: expected features of 36 reference pictures, got \(1, 12\)"):
        cli.load_judges(reference, [f"emoji={encoder}"], {"emoji": judges[0].real[:1]})
    weights = network.load_encoder(encoder).state_dict()
    weights["head.bias"][0] = float("nan")
    network.save_encoder(tmp_path / "nan.safetensors", network.load_encoder(encoder).shape, weights)
    with pytest.raises(ValueError, match="emoji: expected finite features"):
        cli.load_judges(reference, [f"emoji={tmp_path / 'nan.safetensors'}"])


def test_the_report_may_lie_in_a_new_folder(tmp_path, archive, encoder, student):
    options = ["--student", str(student), "--features", f"emoji={encoder}", "--seeds", "1"]
    assert run(tmp_path, archive, *options, "--out", str(tmp_path / "new/report.json")) == 0
    assert json.loads((tmp_path / "new/report.json").read_text())["pictures"] == 3


def test_a_model_of_oblong_pictures_is_drawn_at_its_size():
    components = tiny.sd15()
    unet, vae = tiny.unet(sample_size=(8, 12)), components.vae
    shapes = []

    def sample(noise, text, seeds):
        shapes.append(tuple(noise.shape))
        return noise

    painter = torch_painter(replace(components, unet=unet), CPU, sample)
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    assert painter(["a cat"], range(1, 3)).shape == (2, 8 * pixels, 12 * pixels, 3)
    assert shapes == [(2, 4, 8, 12)]


def test_a_prompt_asks_for_the_concept_whose_caption_it_is():
    captions = [["cat", "pet"], ["dog", "pet", "Hound"]]
    asked = figures.ask(["a robot", "hound", "dog, noto style", "pet", "cat, noto classic style"], captions, STYLES)
    assert asked.asked.tolist() == [2, 1, 1, 0, 0]
    assert asked.candidates[2] == ["a robot"]
    assert asked.free.tolist() == [True, True, False, True, False]


class Signs(features.Extractor):
    """Texts and pictures on axes: a style's word decides."""

    name, reads = "signs", True

    def pictures(self, pictures: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def texts(self, texts: list[str]) -> np.ndarray:
        return np.array([[float(f", {style} style" in text) for style in STYLES] for text in texts], np.float32) + 0.1


def test_styles_are_counted_where_no_word_asks_for_one():
    asked = figures.ask(["cat", "dog", "cat, flat style"], [], STYLES)
    made = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 1, 1, 0, 0, 0]]
    counts, found = figures.styles_of(Signs(), made, np.repeat(np.arange(3), 3), asked, samples=5)
    assert counts == {"noto": 1, "flat": 4, "noto classic": 1}
    assert found["styles"].value == 2 and found["evenness"].value == pytest.approx(0.5)


def test_clip_sees_pictures_as_its_preprocessor_says(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 600, "bos_token_id": 510, "eos_token_id": 511}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 8, "patch_size": 4}, projection_dim=6)
    tiny.save_clip_tokenizer(tmp_path, pad="<|endoftext|>")
    CLIPModel(config).save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessor(**size).save_pretrained(tmp_path)
    (extractor,) = load_extractors([f"clip={tmp_path}"], CPU)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    found = extractor.pictures(pictures)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((torch.from_numpy(pictures) / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = CLIPModel.from_pretrained(tmp_path).eval().get_image_features(pixels).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    alone, together = extractor.texts(["a cat"]), extractor.texts(["a cat", "two dogs on a sofa"])
    assert together.shape == (2, 6)
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)


def test_dinov2_gives_its_class_token_at_its_own_size(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**size, **half).save_pretrained(tmp_path)
    (extractor,) = load_extractors([f"dinov2={tmp_path}"], CPU)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    expected = Dinov2Model.from_pretrained(tmp_path).eval()(pixels).last_hidden_state[:, 0].detach().numpy()
    np.testing.assert_allclose(extractor.pictures(pictures), expected, atol=1e-5)
    assert extractor.pictures(np.zeros((1, 64, 50, 3), np.uint8)).shape == (1, 16)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{tmp_path}: 1 weights of a Dinov2Model are missing, such as layernorm.bias"):
        load_extractors([f"dinov2={tmp_path}"], CPU)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{tmp_path}: expected a Dinov2Model"):
        load_extractors([f"dinov2={tmp_path}"], CPU)


def test_an_encoder_comes_back_from_its_file_and_takes_any_size(encoder):
    loaded = network.load_encoder(encoder)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), np.uint8)
    found = loaded.embed_pictures(pictures)
    assert found.shape == (5, 12)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    grown = pictures.repeat(3, axis=1).repeat(3, axis=2)
    assert (metrics.unit(loaded.embed_pictures(grown)) * found).sum(axis=1).min() > 0.98


def test_another_file_is_no_encoder(tmp_path, student):
    for path in (student, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"python -m evaluation\.encoder"):
            network.load_encoder(path)


def test_augmentations_keep_white_paper_dark_lines_and_what_has_a_side():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.ones(64, 3, 32, 32)
    pixels[:, :, 12:20, 6:10] = -1  # a bar, left of the middle
    none = torch.zeros(64, dtype=torch.bool)
    changed = augment.augment(pixels, none, generator)
    assert changed.shape == pixels.shape and changed.abs().max() < 1.3
    dark = (changed.mean(dim=1) < -0.3).float()
    assert (dark.sum(dim=(1, 2)) > 4).all()
    columns = torch.arange(32.0)
    middle = (dark.sum(dim=1) * columns).sum(dim=1) / dark.sum(dim=(1, 2))
    assert middle.max() < 16
    mirrored = (augment.augment(pixels, ~none, generator).mean(dim=1) < -0.3).float()
    right = (mirrored.sum(dim=1) * columns).sum(dim=1) / mirrored.sum(dim=(1, 2)) > 16
    assert 0.25 < right.float().mean() < 0.75
    assert not augment.may_be_mirrored("alarm clock") and augment.may_be_mirrored("cat face")


def test_colors_keep_their_names():
    pixels = torch.ones(200, 3, 16, 16)
    pixels[:, :, 4:12, 4:12] = torch.tensor([1.0, 0.7, -1.0])[:, None, None]  # yellow
    red, green, blue = augment.augment(pixels, torch.zeros(200, dtype=torch.bool), torch.Generator())[:, :, 8, 8].T
    assert (red > blue + 0.5).all() and (green > blue + 0.3).all() and ((red - green).abs() < 0.9).all()


SMALL = ["--batch-size", "16", "--width", "8", "--resolution", "16"]


def test_an_encoder_is_trained_resumes_and_reports_its_retrieval(tmp_path, archive, capsys):
    whole = ["--drawings", str(archive), "--out", str(tmp_path / "whole"), *SMALL]
    whole += ["--iterations", "6", "--checkpoint-every", "3", "--mixed-precision", "no", "--keep", "2"]
    assert encoder_main(whole) == 0
    assert "retrieval of the concept of" in capsys.readouterr().out
    report = json.loads((tmp_path / "whole/report.json").read_text())
    held = contrastive.held_out(load_reference(archive))
    assert report["drawings"] == held.sum() > 0 and report["concepts"] == CONCEPTS
    assert report["top5"]["value"] >= report["top1"]["value"]
    weights = load_file(tmp_path / "whole/encoder.safetensors")
    (tmp_path / "whole/encoder.safetensors").unlink()
    (tmp_path / "whole/report.json").unlink()
    (sorted((tmp_path / "whole/checkpoints").iterdir())[-1]).rename(tmp_path / "newest")
    assert encoder_main(whole) == 0  # from the start or from an older checkpoint
    again = load_file(tmp_path / "whole/encoder.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_run_does_not_resume_on_other_drawings(tmp_path, archive, capsys):
    command = ["--out", str(tmp_path / "run"), *SMALL, "--iterations", "1", "--drawings"]
    assert encoder_main([*command, str(archive)]) == 0
    (tmp_path / "run/report.json").unlink()
    other = shutil.copytree(archive.parent, tmp_path / "other")
    captions = json.loads((other / "captions.json").read_text())
    (other / "captions.json").write_text(json.dumps([[f"other {i}"] for i in range(len(captions))]))
    assert encoder_main([*command, str(other / "drawings.npz")]) == 2
    assert "captions" in capsys.readouterr().err


def test_a_finished_encoder_is_not_taken_for_another(tmp_path, archive, capsys):
    command = ["--out", str(tmp_path / "run"), *SMALL, "--iterations", "1", "--drawings", str(archive)]
    assert encoder_main([*command, "--mixed-precision", "no"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")  # as in a process that has trained something else
    assert encoder_main([*command, "--mixed-precision", "bf16"]) == 0  # finished, so nothing is computed
    assert encoder_main([*command, "--mixed-precision", "no"]) == 0
    assert encoder_main([*command, "--seed", "9"]) == 2
    assert "another configuration: seed" in capsys.readouterr().err
    other = shutil.copytree(archive.parent, tmp_path / "other") / "drawings.npz"
    with np.load(archive) as arrays:
        np.savez(other, **{**arrays, "images": 255 - arrays["images"]})
    assert encoder_main([*command[:-1], str(other)]) == 2
    assert "another configuration: drawings" in capsys.readouterr().err
    (tmp_path / "run/report.json").write_text('{"settings"')
    assert encoder_main(command) == 2
    assert f"{tmp_path / 'run/report.json'}: expected JSON" in capsys.readouterr().err


def test_drawings_of_which_none_is_held_out_are_refused(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "held_out", lambda reference: np.zeros(len(reference.pictures), bool))
    with pytest.raises(ValueError, match="no drawing would be held out of 36"):
        retrieval.train_encoder(load_reference(archive), tmp_path / "run", EncoderConfig(iterations=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_encoder_learns_to_find_a_color(archive, tmp_path):
    options = [*SMALL, "--iterations", "40", "--learning-rate", "0.01"]
    assert encoder_main(["--drawings", str(archive), "--out", str(tmp_path), *options]) == 0
    log = [line.split(",") for line in (tmp_path / "losses.csv").read_text().splitlines()]
    column = log[0].index("concept")
    losses = [float(row[column]) for row in log[1:]]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_the_split_is_not_that_of_what_is_judged(archive):
    reference = load_reference(archive)
    before = contrastive.held_out(reference)
    assert 0 < before.mean() < 0.3
    fewer = Reference(reference.pictures[:10], reference.concept[:10], reference.style[:10], reference.captions, STYLES)
    assert contrastive.held_out(fewer).tolist() == before[:10].tolist()  # a picture's side never changes


def test_drawings_without_concepts_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "plain.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    assert encoder_main(["--drawings", str(tmp_path / "plain.npz"), "--out", str(tmp_path / "out")]) == 2
    assert "captions.json" in capsys.readouterr().err


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "captions", "said"),
    [
        ({"images": IMAGES, "concept": np.zeros(2)}, None, r"x\.npz: expected `concept`, int64 \(n,\), got float64"),
        ({"images": IMAGES, "style": np.zeros((2, 1), int)}, None, r"x\.npz: expected `style`, int64 \(n,\)"),
        ({"images": IMAGES}, '[["a cat"], ["a d', r"captions\.json: expected JSON"),
        ({"images": IMAGES}, '[["a cat"], []]', r"captions\.json: expected a list with the captions"),
        ({"images": IMAGES}, '["a cat"]', r"captions\.json: expected lists of texts, got 'a cat'"),
        (IMAGES, None, r"x\.npz: expected a folder of pictures or an NPZ: found ndarray"),
        (b"", None, r"x\.npz: expected a folder of pictures or an NPZ"),
    ],
)
def test_damaged_drawings_are_refused_by_the_name_of_their_file(tmp_path, content, captions, said):
    path = tmp_path / "x.npz"
    with path.open("wb") as file:
        if isinstance(content, dict):
            np.savez(file, **content)
        elif isinstance(content, bytes):
            file.write(content)
        else:
            np.save(file, content)
    if captions is not None:
        (tmp_path / "captions.json").write_text(captions)
    with pytest.raises(ValueError, match=said):
        load_reference(path)


@pytest.mark.parametrize(
    "content", [{}, {"images": np.zeros((2, 8, 8), np.uint8)}, {"images": np.zeros((0, 8, 8, 3), np.uint8)}]
)
def test_an_archive_without_pictures_is_refused(tmp_path, content):
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(ValueError, match="images"):
        load_reference(tmp_path / "x.npz")


def test_pictures_of_a_folder_are_squares_on_white(tmp_path, monkeypatch):
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (10, 30), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "broken.jpg").write_text("no picture")
    reference = load_reference(tmp_path, 16)
    assert reference.pictures[1:3].shape == (2, 16, 16, 3)
    assert (reference.pictures[[1]] == 255).all() and (reference.pictures[[2]] == [255, 0, 0]).all()
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        reference.pictures[[0]]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # A red one has 300, over twice as many.
    with pytest.raises(ValueError, match=r"red\.png: expected a picture: .*decompression bomb"):
        reference.pictures[[2]]
