import json
from dataclasses import replace

import pytest
from invented import prepared, random_drawings, save_pictures
from PIL import Image
from tiny import v_teacher

from recipes.baselines import lcm
from recipes.baselines.config import LcmConfig
from recipes.baselines.pictures import CaptionedPictures
from recipes.emoji.__main__ import main as make
from recipes.quality.__main__ import main
from recipes.quality.contest import Contest
from recipes.quality.rows import PRESETS, ROWS
from tiue.distill.loop import train


def test_every_row_has_a_start_that_comes_before_it():
    known = {"teacher", "warm"}
    for row in ROWS:
        assert set(row.start) <= known, row.name
        known.add(row.name)
    assert len(known) == len(ROWS) + 2 - 1  # "teacher" is a row, too.


def test_unknown_rows_and_a_missing_source_are_named(tmp_path, capsys):
    assert main(["--rows", "TiUE;nothing", "--out", str(tmp_path)]) == 2
    assert "got nothing" in capsys.readouterr().err
    assert main(["--source", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "has no data/captions.json" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the model knows no word")  # its names are invented
def test_the_comparison_runs_and_repeats_nothing(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    prepared(random_drawings(), source / "data")
    assert make(["--preset", "smoke", "--out", str(source), "--until", "polish"]) == 0
    command = ["--preset", "smoke", "--source", str(source), "--out", str(out)]
    assert main(command) == 0
    table = (out / "table.md").read_text()
    rows = PRESETS["smoke"].rows
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
    for name in ("latency.png", "losses.png", "sheet.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 100
    before = {path: path.stat().st_mtime_ns for path in (out / "rows").rglob("*") if path.is_file()}
    assert main([*command, "--rows", "TiUE;LCM"]) == 0
    assert (out / "table.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in (out / "rows").rglob("*") if path.is_file()} == before


def test_a_student_of_several_steps_is_timed_in_a_loop(tmp_path):
    model, pictures = v_teacher(), tmp_path / "pictures"
    pictures.mkdir()
    data = CaptionedPictures(save_pictures(pictures), model.geometry.height * model.geometry.pixels_per_latent)
    result = train(*lcm.prepare(model, data, tmp_path / "run", LcmConfig(iterations=1, batch_size=2)), progress=False)
    contest = Contest(replace(PRESETS["cpu"], runs=3), tmp_path, random_drawings(), tmp_path)
    (row,) = (row for row in ROWS if row.name == "LCM")
    one, four = (contest.timed(row, result, steps, tmp_path / "timed") for steps in (1, 4))
    assert 0 < one["least"] <= one["median"] <= one["most"] and one["median"] < four["median"]
    assert json.loads((tmp_path / "timed/latency-4.json").read_text()) == four


def _steps(row) -> str:
    return "1 step" if row.steps == (1,) else f"{row.steps[0]} steps"
