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
from recipes.directory import claim
from recipes.emoji.__main__ import main as main_of_emoji
from recipes.quality.__main__ import main
from recipes.quality.contest import Contest
from recipes.quality.judging import Judging, separate_painter
from recipes.quality.material import Material
from recipes.quality.rows import PRESETS, ROWS
from tiue.checkpoint import load_student
from tiue.distill.config import DistillConfig
from tiue.distill.loop import train
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
    (tmp_path / "data").mkdir()
    (tmp_path / "data/captions.json").write_text("[]")
    assert main(["--source", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert main_of_emoji(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("has results of other settings") == 2


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


def test_a_row_takes_the_settings_that_were_best_for_the_row_it_is_like(tmp_path):
    contest = Contest(Material(PRESETS["cpu"], tmp_path, random_drawings(), tmp_path))
    tried = [{"settings": dict(settings), "frechet": 2.0 - i} for i, settings in enumerate(_row("TiUE").search)]
    (tmp_path / "rows/tiue").mkdir(parents=True)
    (tmp_path / "rows/tiue/search.json").write_text(json.dumps(tried))
    assert contest.best(_row("TiUE without KL")) == contest.best(_row("TiUE")) == tried[-1]["settings"]
    assert contest.best(_row("warm start")) == {}


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
