import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from invented import prepared, random_drawings
from PIL import Image
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle, write_bundle
from tolerances import FRECHET, OF_4000_SAMPLES, REORDERED

from evaluation.metrics import frechet
from recipes.emoji import data, polish, report, student
from recipes.emoji.__main__ import main
from recipes.emoji.autoencoder import encode, to_pixels, whiten
from recipes.emoji.best import load_best
from recipes.emoji.presets import PRESETS
from recipes.emoji.stage import autocast, minimize, spaced
from recipes.emoji.student import bundle, load_pairs
from recipes.emoji.studies import drift, sharing
from recipes.emoji.teacher import SCHEDULER, load_teacher, with_mirrored
from recipes.quality.__main__ import main as compare
from recipes.quality.rows import PRESETS as COMPARISONS
from tiue.checkpoint import load_student
from tiue.components import load_components
from tiue.distill.command import status_of
from tiue.schedule import NoiseSchedule
from tiue.text_encoder import encode_text


@pytest.fixture(scope="module")
def drawings() -> data.Drawings:
    return random_drawings()


@pytest.fixture(scope="module")
def made(tmp_path_factory, drawings) -> Path:
    """A directory of results, with the data alone at first."""
    directory = tmp_path_factory.mktemp("made")
    prepared(drawings, directory / "data")
    return directory


def test_a_tenth_is_held_out_and_stays_so(drawings):
    assert 0.05 < drawings.held_out.mean() < 0.15
    assert [data.is_held_out("2764", style) for style in data.STYLES] == [False, False, True, False, False, True]


def test_drawing_is_on_white():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><rect width="2" height="4" fill="#f00"/></svg>'
    image = data.render(svg, 8)
    assert image.shape == (8, 8, 3)
    assert (image[:, :4] == [255, 0, 0]).all() and (image[:, 4:] == 255).all()


def test_captions_name_the_style_only_when_asked(drawings):
    assert drawings.caption(3, 1, False) == "a thing 0"
    assert drawings.caption(3, 1, True) == "a thing 0, fluent flat style"


def pack(folder: Path) -> str:
    """Stands for npm pack: an archive with one file. Returns its name."""
    (folder / "package").mkdir()
    (folder / "package/icons.json").write_text("{}")
    with tarfile.open(folder / "x-1.tgz", "w:gz") as tar:
        tar.add(folder / "package", "package")
    shutil.rmtree(folder / "package")
    return "x-1.tgz"


def test_a_package_is_unpacked_whole_or_not_at_all(tmp_path, monkeypatch):
    done = SimpleNamespace(stdout=f"{pack(tmp_path)}\n")
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: done)
    with monkeypatch.context() as patch:

        def killed(self, path, **_):
            (Path(path) / "package").mkdir(parents=True)
            raise KeyboardInterrupt

        patch.setattr(tarfile.TarFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            data.fetch("x@1", tmp_path)
    assert (data.fetch("x@1", tmp_path) / "icons.json").read_text() == "{}"
    monkeypatch.setattr(data.subprocess, "run", None)  # It is there already.
    assert (data.fetch("x@1", tmp_path) / "icons.json").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "npm"), "npm is not installed, and only it can fetch x@1"),
        (subprocess.CalledProcessError(1, "npm", stderr="npm error\ncode E404"), "fetch x@1: npm error code E404"),
    ],
)
def test_a_package_that_cannot_be_fetched_is_an_error_of_one_line(error, said, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(data.subprocess, "run", fails)
    with pytest.raises(OSError, match=said):
        data.fetch("x@1", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_package_is_an_error_that_names_it(content, tmp_path, monkeypatch):
    name = pack(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60] if content is None else content)
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"{name}\n"))
    with pytest.raises(OSError, match="npm fetched a damaged x@1"):
        data.fetch("x@1", tmp_path)
    assert not (tmp_path / "x-1").exists()


def test_a_damaged_data_set_is_an_error_that_names_the_file(tmp_path, drawings):
    prepared(drawings, tmp_path / "data")
    assert (data.prepare(tmp_path / "data", 64, False).images == drawings.images).all()
    with pytest.raises(ValueError, match="expected drawings of 128 x 128 pixels, got 64 x 64"):
        data.prepare(tmp_path / "data", 128, False)
    captions = (tmp_path / "data/captions.json").read_text()
    for content, said in (
        (captions[:-20], "captions.json: expected JSON"),
        ('[["one"]]', "drawings of the 1 concepts"),
    ):
        (tmp_path / "data/captions.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            data.load(tmp_path / "data")
    archive = tmp_path / "data/drawings.npz"
    archive.write_bytes(archive.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"drawings\.npz: expected an NPZ"):
        data.load(tmp_path / "data")


def test_damaged_pairs_are_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "pairs.pt"
    torch.save({"captions": ["a"], "noise": torch.zeros(2, 1), "latents": torch.zeros(2, 1)}, path)
    with pytest.raises(ValueError, match=r"pairs\.pt: expected as many captions as noise"):
        load_pairs(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"pairs\.pt: expected the teacher's pairs"):
        load_pairs(path)


@pytest.mark.parametrize(
    ("label", "icon"),
    [
        ("rocket", "rocket"),
        ("robot", "robot-face"),
        ("smiling cat with heart-eyes", "smiling-cat-face-with-heart-eyes"),
        ("heart exclamation", "heavy-heart-exclamation"),
        ("white flag", "flag-for-white-flag"),
        ("O button (blood type)", "o-button"),
        ("hot beverage", "hot-beverage"),  # an alias
        ("melting face", None),
    ],
)
def test_an_icon_is_found_by_its_name_of_2016_too(label, icon, tmp_path):
    drawn = ["rocket", "robot-face", "smiling-cat-face-with-heart-eyes", "heavy-heart-exclamation"]
    drawn += ["flag-for-white-flag", "o-button"]
    icons = {"icons": {name: {} for name in drawn}, "aliases": {"hot-beverage": {}}}
    (tmp_path / "icons.json").write_text(json.dumps(icons))
    (tmp_path / "chars.json").write_text("{}")
    assert data._IconSet(tmp_path).find({"label": label, "hexcode": "1F680"}) == icon


def test_chosen_concepts_are_unique():
    labels = data.concept_list()
    assert len(labels) == len(set(labels)) == 298


def test_a_spoken_name_belongs_to_one_concept():
    names = data.spoken_names()
    every = [name for several in names.values() for name in several]
    assert len(every) == len(set(every)) > 250 and all(name == name.strip() != "" for name in every)
    assert "cup of coffee" in names["hot beverage"] and "happy cat" in names["grinning cat"]


def test_captions_hold_the_label_first_then_what_people_say():
    entry = {"label": "hot beverage", "hexcode": "2615", "tags": ["coffee", "tea"]}
    taken = {"hot beverage", "a hot beverage", "mug", "a mug"}
    names = [{"2615": ["coffee", "mug"]}]
    captions = data._captions(entry, names, {"coffee": 1, "tea": 2}, ["cup of coffee", "Mug"], taken)
    assert captions[:4] == ["hot beverage", "a hot beverage", "cup of coffee", "a cup of coffee"]
    assert "coffee" in captions and "tea" not in captions  # Another concept has the tag "tea" as well.
    assert not {"mug", "Mug", "a Mug"} & set(captions)  # It is another concept's label.


def test_the_teacher_starts_at_pure_noise():
    process = NoiseSchedule.from_config(SCHEDULER)
    assert process.timesteps(4) == [999, 749, 499, 249] and process.abar[999] == 0
    one = process.closed_form(1)  # z_0 = sqrt(abar) z - sqrt(1 - abar) v, with abar = 0
    assert (one.noise_weight, one.step_weights) == (0, (-1,))


def test_whitening_changes_the_latents_and_not_the_pictures():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4, scaling_factor=1.0).eval()
    images = torch.randint(256, (16, 8, 8, 3), dtype=torch.uint8)
    pixels = to_pixels(images)
    before, pictures = vae.encode(pixels).latent_dist, vae(pixels).sample
    whiten(vae, encode(vae, images))
    after = vae.encode(pixels).latent_dist
    deviation, mean = torch.std_mean(after.mean, dim=(0, 2, 3))
    assert torch.allclose(deviation, torch.ones(3), atol=REORDERED) and torch.allclose(
        mean, torch.zeros(3), atol=REORDERED
    )
    scale = torch.std(before.mean, dim=(0, 2, 3)).view(1, -1, 1, 1)
    assert torch.allclose(after.std * scale, before.std, atol=REORDERED)
    assert torch.allclose(vae(pixels).sample, pictures, atol=REORDERED)


def test_what_may_not_be_mirrored_is_encoded_once():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4, scaling_factor=1.0).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    concept, style, held_out = np.array([0, 1, 1]), np.array([4, 5, 3]), np.array([False, False, True])
    drawings = data.Drawings(images, concept, style, held_out, [["right arrow"], ["cat face"]])
    latents, concepts, styles = with_mirrored(vae, drawings)
    assert concepts.tolist() == [0, 1, 1] and styles.tolist() == [4, 5, 5]  # The third one is held out.
    assert torch.allclose(latents[2], encode(vae, torch.from_numpy(images[1:2]).flip(2))[0], atol=REORDERED)


def test_frechet_distance_of_gaussians():
    a = np.random.default_rng(0).normal(size=(4000, 3))
    assert frechet(a, a) == pytest.approx(0, abs=FRECHET)
    assert frechet(a, a + np.array([1.0, 2.0, 0.0])) == pytest.approx(5.0, rel=FRECHET)
    assert frechet(a, 2 * a) == pytest.approx(3.0, rel=OF_4000_SAMPLES)  # (2 - 1)^2 in each of 3 dimensions


@pytest.mark.filterwarnings("ignore:the model knows no word")  # its names are invented
def test_all_stages_run_and_begin_again_where_they_stopped(made, monkeypatch):
    monkeypatch.setattr(report, "MEASURED", 18)
    for prompts in ("GRID_PROMPTS", "ASKED", "ASKED_TOO"):
        monkeypatch.setattr(report, prompts, ["thing 0, noto style", "a thing 1"])
    command = ["--preset", "smoke", "--out", str(made)]
    assert main([*command, "--until", "student"]) == 0
    warm = (made / "warm.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert (made / "warm.safetensors").stat().st_mtime_ns == warm
    student = load_student(made / "student.safetensors")
    history = student.provenance["history"]
    assert history[0]["steps"] == PRESETS["smoke"].regression_steps
    assert history[1]["distilled"]["iterations"] == PRESETS["smoke"].distill.iterations
    assert history[2]["steps"] == PRESETS["smoke"].fit_steps
    _check_only_the_decoder_was_fitted(made)
    figures = json.loads((made / "figures.json").read_text())
    assert figures.keys() == {"unseen drawings", "teacher", "warm start", "distilled", "with its decoder"}
    assert all(0 <= f["top1"] <= f["top5"] <= 1 and f["frechet"] >= 0 for f in figures.values())
    for run in ("runs/teacher", "distill"):
        found = json.loads((made / run / "best.json").read_text())
        assert found["scores"] and found["best"] == min(found["scores"], key=found["scores"].get)
    assert all((made / f"{name}.png").exists() for name in ("grid", "losses", "asked", "asked-too"))
    assert Pipeline.load(made / "bundle")("a thing 2", seed=3).images[0].size == (64, 64)

    (made / "distill/best.json").unlink()  # as if it had been stopped while checkpoints were scored
    manifest = Bundle.load(made / "bundle").manifest
    assert manifest.prompts is not None and manifest.prompts.vocabulary
    assert sorted(manifest.prompts.styles) == sorted(data.STYLES)
    write_bundle(made / "bundle", replace(manifest, prompts=None))  # as if it had been stopped after the export
    assert main([*command, "--until", "bundle"]) == 0
    assert (made / "distill/best.json").exists()
    assert Bundle.load(made / "bundle").manifest.prompts == manifest.prompts


def _check_only_the_decoder_was_fitted(made: Path) -> None:
    before, after = load_student(made / "distill/student.safetensors"), load_student(made / "fitted.safetensors")
    polished = load_components(made / "polished").vae.state_dict()
    fitted = after.components.vae.state_dict()
    changed = {name for name in polished if not torch.equal(polished[name], fitted[name])}
    assert {"post_quant_conv.weight", "decoder.conv_out.weight"} < changed
    assert all(name.startswith(("post_quant_conv.", "decoder.")) for name in changed)
    unets = [student.components.unet.state_dict() for student in (before, after)]
    assert all(torch.equal(unets[0][name], unets[1][name]) for name in unets[0])


@pytest.mark.parametrize(
    ("pixel", "value", "error"), [(255, 1.3, 0), (255, 0.8, 0.2), (0, -1.5, 0), (0, 1.5, 2.5), (255, -1.5, 2.5)]
)
def test_what_clipping_corrects_is_no_error_of_the_image_decoder(monkeypatch, pixel, value, error):
    monkeypatch.setattr(polish, "decode_latents", lambda vae, z: torch.full((2, 3, 4, 4), value))
    images = torch.full((2, 4, 4, 3), pixel, dtype=torch.uint8)
    assert polish._difference(None, torch.zeros(()), images).item() == pytest.approx(error)


@pytest.mark.filterwarnings("ignore:the model knows no word")  # its names are invented
def test_the_errors_of_a_student_are_those_of_all_its_numbers_of_timesteps(made, monkeypatch):
    monkeypatch.setattr(polish, "_BATCH", 3)
    assert main(["--preset", "smoke", "--out", str(made), "--until", "student"]) == 0
    student, pairs = load_student(made / "warm.safetensors"), torch.load(made / "pairs.pt", weights_only=True)
    latents, meant = polish.student_latents(student, made / "pairs.pt", 8)
    assert torch.equal(meant, pairs["latents"][:8].to(meant.device))
    assert set(student.schedules) == {4, 2, 1}
    with torch.no_grad(), autocast():
        text = encode_text(student.components, pairs["captions"][:8])
        for rows, timesteps in zip((slice(0, 3), slice(3, 6), slice(6, 8)), student.schedules.values(), strict=True):
            schedule = student.components.noise_schedule.closed_form(timesteps)
            expected = student.tiue()(pairs["noise"][rows], text[rows], schedule).float()
            torch.testing.assert_close(latents[rows].cpu(), expected, atol=REORDERED, rtol=0)


@pytest.mark.filterwarnings("ignore:the model knows no word")  # its names are invented
def test_pairs_have_no_held_out_pair_and_are_of_these_drawings(made, drawings):
    preset = replace(PRESETS["smoke"], pairs=40, pair_batch=20)
    assert main(["--preset", "smoke", "--out", str(made), "--until", "teacher"]) == 0
    pairs = student.make_pairs(preset, drawings, load_teacher(made / "teacher"), made / "few.pt")
    styled = [caption for caption in pairs["captions"] if caption.endswith(" style")]
    assert 0 < len(styled) < 40
    held_out = {drawings.caption(row, 0, True).removeprefix("a ") for row in np.flatnonzero(drawings.held_out)}
    assert held_out.isdisjoint(caption.removeprefix("a ") for caption in styled)
    torch.save(pairs | {"captions": pairs["captions"][::-1]}, made / "few.pt")  # as of other drawings
    with pytest.raises(ValueError, match=r"few\.pt has pairs of other captions: delete it"):
        student.make_pairs(preset, drawings, None, made / "few.pt")


@pytest.mark.filterwarnings("ignore:the model knows no word")  # its names are invented
def test_the_comparison_of_methods_runs_and_repeats_nothing(made, tmp_path):
    out = tmp_path / "out"
    assert main(["--preset", "smoke", "--out", str(made), "--until", "polish"]) == 0  # made above, if that test ran
    command = ["--preset", "smoke", "--source", str(made), "--out", str(out)]
    assert compare(command) == 0
    table = (out / "table.md").read_text()
    rows = COMPARISONS["smoke"].rows
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        f"{row.name}, {_steps(row)}" for row in rows
    ]
    tried = json.loads((out / "rows/lcm/search.json").read_text())
    (of_lcm,) = (row for row in rows if row.name == "LCM")
    assert [entry["settings"] for entry in tried] == [dict(settings) for settings in of_lcm.search]
    trained = json.loads((out / "rows/lcm/seed-0/training.json").read_text())
    assert trained["iterations"] == 1 and len(trained["sha256"]) == 64
    # An update of LCM on 2 pictures: the student forward and backward, the teacher twice (guidance), the target once.
    assert trained["passes"] == pytest.approx(2 * (3 + 2 + 1), rel=0.1)
    kept = json.loads((out / "runs.json").read_text())
    assert kept["LCM"]["search"] == tried and kept["LCM"]["seeds"][0]["sha256"] == trained["sha256"]
    for name in ("latency.png", "losses.png", "sheet.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 100
    before = {path: path.stat().st_mtime_ns for path in (out / "rows").rglob("*") if path.is_file()}
    assert compare([*command, "--rows", "TiUE;LCM"]) == 0
    assert (out / "table.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in (out / "rows").rglob("*") if path.is_file()} == before


def _steps(row) -> str:
    return "1 step" if row.steps == (1,) else f"{row.steps[0]} steps"


@pytest.mark.parametrize("study", [drift, sharing])
def test_a_study_draws_at_the_size_of_the_shipped_student_and_refuses_other_results(
    study, tmp_path, monkeypatch, capsys
):
    sizes = []

    def stopped(directory, resolution, all_concepts):
        sizes.append(resolution)
        raise ValueError("stopped here")

    monkeypatch.setattr(data, "prepare", stopped)
    command = ["--preset", "cpu", "--out", str(tmp_path), "--steps"]
    assert study.main([*command, "7"]) == 2
    assert "stopped here" in capsys.readouterr().err and sizes == [64]
    assert study.main([*command, "8"]) == 2
    assert "has results of other settings: steps 7 -> 8" in capsys.readouterr().err and sizes == [64]


@pytest.mark.slow  # The recipe itself is tested above.
def test_the_drift_of_predicted_noise_is_measured(tmp_path, drawings, monkeypatch):
    monkeypatch.setattr(report, "MEASURED", 8)
    prepared(drawings, tmp_path / "data")
    assert drift.main(["--preset", "smoke", "--steps", "1", "--iterations", "2", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "drift.json").read_text())
    assert figures.keys() == {"before", "with KL", "without KL"}
    assert all(0 <= figures[name]["top1"] <= 1 and figures[name]["frechet"] > 0 for name in figures)
    assert (tmp_path / "drift.png").exists() and (tmp_path / "pictures.png").exists()
    assert {"mu_751", "v_751", "mu_1", "v_1", "kl"} < figures["with KL"].keys() == figures["without KL"].keys()
    assert figures["with KL"]["v_1"] != figures["without KL"]["v_1"] > 0


def test_an_export_that_fails_ends_the_command_in_one_line(drawings, tmp_path, monkeypatch, capsys):
    for name, result in {"load_student": None, "save_student": None, "export": 1}.items():
        monkeypatch.setattr(f"recipes.emoji.student.{name}", lambda *_, result=result: result)
    work = partial(bundle, drawings, tmp_path / "fitted.safetensors", tmp_path)
    assert status_of("python -m recipes.emoji", work) == 2
    assert capsys.readouterr().err == "python -m recipes.emoji: error: the export ended with status 1\n"


def test_the_checkpoint_with_the_best_score_is_kept(tmp_path):
    network = torch.nn.Linear(1, 1, bias=False)

    def loss(generator: torch.Generator, count: int) -> torch.Tensor:
        return (100 - network.weight).sum()  # The weight grows in every update.

    settings = {"iterations": 10, "learning_rate": 1.0, "ema_decay": 0.0001, "seed": 0, **spaced(10)}
    minimize(network, loss, tmp_path, **settings)
    grown = network.weight.item()
    scores = load_best(tmp_path, network, lambda: abs(network.weight.item() - grown + 3))
    best = min(scores, key=scores.__getitem__)
    assert len(scores) == 4 and scores[best] < scores["step-00000010"]
    assert best != "step-00000010" and network.weight.item() < grown
    for name, value in (("learning_rate", 2.0), ("weight_decay", 0.1), ("muon", 0.1)):
        with pytest.raises(ValueError, match=f"another configuration: {name}"):
            minimize(network, loss, tmp_path, **settings | {name: value})
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoints to choose from"):
        load_best(tmp_path, network, lambda: 0.0)
    (tmp_path / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"weights\.safetensors: expected the weights"):
        minimize(network, loss, tmp_path, **settings)
