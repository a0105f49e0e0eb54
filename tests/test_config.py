import dataclasses
import json
from pathlib import Path

import pytest

from tiue.distill.config import DistillConfig, read_preset

PRESETS = sorted((Path(__file__).parents[1] / "models").glob("*.json"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_valid_and_names_differences_only(path):
    settings = read_preset(path)
    defaults = dataclasses.asdict(DistillConfig())
    assert settings and all(defaults[name] != value for name, value in settings.items())
    DistillConfig(**settings)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('"learning_rate": "1e-6"', "learning_rate must be of type float, got '1e-6'"),
        ('"steps": "4"', "steps must be positive whole numbers, got '4'"),
        ('"steps": 4.5', "steps must be positive whole numbers, got 4.5"),
        ('"batch_size": true', "batch_size must be of type int, got True"),
        ('"grad_clip": null', "grad_clip must be of type float, got None"),
        ('"fake_score": 1', "fake_score must be of type str, got 1"),
        ('"fake_score": "half"', "fake_score must be one of lora, full, got 'half'"),
        ('"guidance": Infinity', "guidance must be a number from 0 on, got inf"),
        ('"steps": 0', "steps must be positive whole numbers, got 0"),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, setting, message):
    (tmp_path / "preset.json").write_text(f"{{{setting}}}")
    with pytest.raises(ValueError) as error:
        DistillConfig(**read_preset(tmp_path / "preset.json"))
    assert str(error.value) == message


def test_a_whole_number_will_do_for_a_real_one(tmp_path):
    (tmp_path / "preset.json").write_text(json.dumps({"guidance": 2}))
    assert DistillConfig(**read_preset(tmp_path / "preset.json")).guidance == 2.0
