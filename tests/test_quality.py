import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from invented import random_drawings, save_pictures
from tiny import emoji, v_teacher

from evaluation.painters import torch_painter
from recipes.baselines import lcm
from recipes.baselines.config import LcmConfig
from recipes.baselines.pictures import CaptionedPictures
from recipes.directory import claim, whole_directory
from recipes.emoji.__main__ import main as main_of_emoji
from recipes.quality import page
from recipes.quality.__main__ import main
from recipes.quality.contest import Contest
from recipes.quality.cost import Cost
from recipes.quality.judging import Judging, separate_painter
from recipes.quality.material import Material
from recipes.quality.rows import PRESETS, ROWS
from tiue.checkpoint import Student, load_student, save_student
from tiue.distill.config import DistillConfig
from tiue.distill.loop import train
from tiue.distill.runs import record_run
from tiue.distill.vsd import prepare

BUNDLE = Path(__file__).parents[1] / "models/emoji/tiue_emoji"


def test_every_row_has_a_start_that_comes_before_it():
    known = {"teacher", "warm"}
    for row in ROWS:
        assert set(row.start) <= known and row.like in {None, *known}, row.name
        known.add(row.name)
    assert len(known) == len(ROWS) + 2 - 1  # "teacher" is a row, too.


def test_unknown_rows_and_a_missing_source_are_named(tmp_path, capsys):
    assert main(["--rows", "TiUE;nothing", "--out", str(tmp_path)]) == 2
    assert "got nothing" in capsys.readouterr().err
    assert main(["--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "--seeds: expected 1 or more, got 0" in capsys.readouterr().err
    assert main(["--source", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "has no data/captions.json" in capsys.readouterr().err


def test_the_results_of_one_preset_are_not_taken_for_those_of_another(tmp_path, capsys):
    smoke = {"name": "smoke", "rates": (1, 2), "judge": {"seed": 0, "width": 8}}
    claim(tmp_path, smoke)
    claim(tmp_path, smoke | {"new": 1})  # a setting of a later version
    expected = 'has results of other settings: name "smoke" -> "cpu", judge.seed 0 -> 9$'
    with pytest.raises(ValueError, match=expected):
        claim(tmp_path, {"name": "cpu", "rates": [1, 2], "judge": {"seed": 9, "width": 8}})
    source = _source(tmp_path / "source")
    assert main(["--source", str(source), "--out", str(tmp_path)]) == 2
    assert main_of_emoji(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("has results of other settings") == 2
    (tmp_path / "preset.json").write_text('{"name"')
    assert main_of_emoji(["--out", str(tmp_path)]) == 2
    assert f"{tmp_path / 'preset.json'}: expected JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["data/captions.json", "data/drawings.npz", "polished/unet/weights", "warm.safetensors"]
)
def test_the_results_of_one_source_are_not_taken_for_those_of_another(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipes.emoji.data.load", _stopped)
    command = ["--source", str(_source(tmp_path / "source")), "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert main(command) == 2
        assert "stopped here" in capsys.readouterr().err
    (tmp_path / "source" / name).write_text("changed")
    assert main(command) == 2
    assert f"has results of other settings: source.{name.split('/unet')[0]}" in capsys.readouterr().err
    preset = json.loads((tmp_path / "out/preset.json").read_text())
    del preset["source"]  # as an older version left it
    (tmp_path / "out/preset.json").write_text(json.dumps(preset))
    assert main(command) == 2
    assert "stopped here" in capsys.readouterr().err
    (tmp_path / "source" / name).write_text("changed again")
    assert main(command) == 2
    assert "has results of other settings: source." in capsys.readouterr().err


def _stopped(*_):
    raise ValueError("stopped here")


def _source(directory):
    for name in ("data/captions.json", "data/drawings.npz", "polished/unet/weights", "warm.safetensors"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


def test_a_directory_is_whole_or_as_before(tmp_path):
    for content in ("first", "second"):
        with whole_directory(tmp_path / "made") as unfinished:
            unfinished.mkdir()
            (unfinished / "file").write_text(content)
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "made") as unfinished:
        unfinished.mkdir()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made/file").read_text() == "second"


def test_a_student_of_several_steps_runs_its_graphs_in_a_loop(tmp_path, monkeypatch):
    judging = Judging(Material(replace(PRESETS["cpu"], runs=5), tmp_path, random_drawings(), tmp_path))
    (tmp_path / "timed").mkdir()
    monkeypatch.setattr(judging, "_exported", lambda *_: shutil.copytree(BUNDLE, tmp_path / "bundle"))
    judging.timed(replace(_row("LCM"), steps=(8, 1)), tmp_path, tmp_path / "timed")
    one, eight = (json.loads((tmp_path / f"timed/latency-{steps}.json").read_text()) for steps in (1, 8))
    assert 0 < one["least"] <= one["median"] <= one["most"] and one["median"] < eight["median"]
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow  # It exports a student.
def test_a_student_of_several_steps_is_timed_in_a_loop(tmp_path):
    model, pictures = v_teacher(), tmp_path / "pictures"
    pictures.mkdir()
    data = CaptionedPictures(save_pictures(pictures), model.geometry.height * model.geometry.pixels_per_latent)
    result = train(*lcm.prepare(model, data, tmp_path / "run", LcmConfig(iterations=1, batch_size=2)), progress=False)
    judging = Judging(Material(replace(PRESETS["cpu"], runs=3), tmp_path, random_drawings(), tmp_path))
    shutil.copytree(BUNDLE, tmp_path / "timed/bundle")  # of a comparison that was stopped here
    judging.timed(_row("LCM"), result, tmp_path / "timed")
    one, four = (json.loads((tmp_path / f"timed/latency-{steps}.json").read_text()) for steps in (1, 4))
    assert 0 < one["least"] <= one["median"] <= one["most"] and one["median"] < four["median"]


def test_the_control_is_drawn_by_one_unet_per_step(tmp_path):
    config = DistillConfig(iterations=1, batch_size=2, lora_rank=2, share_encoder=False)
    student = load_student(train(*prepare(emoji(), ["a cat", "a house"], tmp_path, config), progress=False))
    unet, schedule = student.components.unet, student.schedule(4)

    def separate(noise, text, seeds):
        eps = [unet(noise, t, text).sample for t in schedule.timesteps]
        return schedule.noise_weight * noise + sum(w * e for w, e in zip(schedule.step_weights, eps, strict=True))

    expected = torch_painter(student.components, torch.device("cpu"), separate)(["a cat"], range(1, 3))
    made = separate_painter(student, 4)(["a cat"], range(1, 3)).astype(int)
    assert abs(made - expected).max() <= 1 and made.std() > 1


def test_the_warm_start_is_drawn_with_the_image_decoder_of_all_rows(tmp_path, monkeypatch):
    made = v_teacher()
    vae = copy.deepcopy(made.vae)
    vae.decoder.conv_out.bias.data += 1
    save_student(tmp_path / "warm.safetensors", Student(made, 999, {1: (999,)}, base_model="tiny"))
    monkeypatch.setattr("recipes.quality.material.load_components", lambda _: replace(made, vae=vae))
    (tmp_path / "out").mkdir()
    material = Material(PRESETS["cpu"], tmp_path, random_drawings(), tmp_path / "out")
    found = load_student(material.warm).components
    assert torch.equal(found.vae.decoder.conv_out.bias, vae.decoder.conv_out.bias)
    assert torch.equal(found.unet.conv_in.weight, made.unet.conv_in.weight)


def test_a_row_takes_the_settings_that_were_best_for_the_row_it_is_like(tmp_path):
    contest = Contest(Material(PRESETS["cpu"], tmp_path, random_drawings(), tmp_path))
    tried = [{"settings": dict(settings), "frechet": 2.0 - i} for i, settings in enumerate(_row("TiUE").search)]
    (tmp_path / "rows/tiue").mkdir(parents=True)
    (tmp_path / "rows/tiue/search.json").write_text(json.dumps(tried))
    assert contest.best(_row("TiUE without KL")) == contest.best(_row("TiUE")) == tried[-1]["settings"]
    assert contest.best(_row("warm start")) == {}
    for content, said in ((tried[:1], "another search"), ("[", "expected JSON")):
        (tmp_path / "rows/tiue/search.json").write_text(content if content == "[" else json.dumps(content))
        with pytest.raises(ValueError, match=rf"search\.json.* {said}"):
            contest.best(_row("TiUE"))


def test_a_finished_run_of_other_settings_is_not_taken_for_that_of_a_row(tmp_path):
    contest = Contest(Material(PRESETS["cpu"], tmp_path, random_drawings(), tmp_path))
    row, out, cost = _row("SwiftBrush v2, full"), tmp_path / "seed-1", Cost(passes=300.0, operations=1.0)
    config = contest._config(row, {**row.settings, "iterations": 100, "seed": 1})
    for change in ({}, {"mixed_precision": "fp16"}, {"clip_margin": 0.2}):  # of another machine, and measured
        record_run(out, replace(config, **change), {"teacher": "1"})
        (out / "training.json").write_text("{}")
        assert contest._trained(row, row.settings, out, 1, cost) == out / "student.safetensors"
    (out / "training.json").write_text(json.dumps({"starts": {"ADD in one step": "1"}}))
    _trained(contest, "ADD in one step", "1")
    contest._trained(row, row.settings, out, 1, cost)
    _trained(contest, "ADD in one step", "2")
    with pytest.raises(ValueError, match=r"ADD in one step was trained again: delete .*seed-1"):
        contest._trained(row, row.settings, out, 1, cost)
    record_run(out, replace(config, guidance=9.0), {})
    with pytest.raises(ValueError, match=r"another configuration: guidance 9\.0 -> \S+$"):
        contest._trained(row, row.settings, out, 1, cost)


def _trained(contest, name, hashed):
    folder = contest.folder(_row(name)) / "seed-0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps({"sha256": hashed}))


def test_a_merge_that_was_stopped_is_made_again_and_one_of_older_students_is_refused(tmp_path, monkeypatch):
    contest, out = Contest(Material(PRESETS["cpu"], tmp_path, random_drawings(), tmp_path)), tmp_path / "merged"
    monkeypatch.setattr(contest, "results", lambda row: [tmp_path / row.name])
    for name, result in {"load_student": None, "swiftbrushv2.merge": None}.items():
        monkeypatch.setattr(f"recipes.quality.contest.{name}", lambda *_, result=result: result)
    monkeypatch.setattr("recipes.quality.contest.save_student", lambda path, _: path.write_text("merged"))
    out.mkdir()
    (out / "student.safetensors").write_text("before")
    for name in _row("SwiftBrush v2").start:
        _trained(contest, name, "1")
    for _ in range(2):
        path = contest._merged(_row("SwiftBrush v2"), out)
        assert path.read_text() == "merged" and len(json.loads((out / "training.json").read_text())["sha256"]) == 64
    _trained(contest, "SwiftBrush v2, LoRA", "2")
    with pytest.raises(ValueError, match="SwiftBrush v2, LoRA was trained again"):
        contest._merged(_row("SwiftBrush v2"), out)


def test_the_table_and_the_plot_say_how_many_seeds_a_row_has_and_leave_gaps_blank(tmp_path, monkeypatch):
    figures = [{"emoji": {"frechet": {"value": v, "low": v - 1, "high": v + 2}}} for v in (4.0, 6.0)]
    latency, nothing = {"median": 0.05}, float("nan")
    both = page.Entry(_row("TiUE"), 4, figures, [{"iterations": 9, "seconds": 60}] * 2, latency, nothing, tmp_path)
    alone = page.Entry(_row("LCM"), 1, figures[:1], [{}], latency, 2e9, tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.table([both, alone]).splitlines()[2:]]
    assert lines[0][:7] == ["TiUE, 4 steps", "2", "9", "1.0", "50", "", "5 (3 to 8)"] and set(lines[0][7:]) == {""}
    assert lines[1][:7] == ["LCM, 1 step", "1", "", "", "50", "2.0", "4 (3 to 6)"]
    plots = []
    monkeypatch.setattr(page, "save_plot", lambda figure, path: plots.append(figure))
    page.plot_latency([both, alone], tmp_path / "latency.png")
    (legend,) = plots[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["TiUE (2 seeds)", "LCM"]


def test_only_seeds_with_all_figures_are_finished(tmp_path):
    contest, row = Contest(Material(PRESETS["cpu"], tmp_path, random_drawings(), tmp_path)), _row("ADD")
    first, second, _ = contest.outs(row)
    for out, steps in ((first, (4, 1)), (second, (4,))):
        out.mkdir(parents=True)
        for number in steps:
            (out / f"figures-{number}.json").write_text("{}")
    assert contest.finished(row) == [first]


def _row(name):
    return next(row for row in ROWS if row.name == name)
