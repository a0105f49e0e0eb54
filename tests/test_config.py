import argparse
import dataclasses
import json
import math
from dataclasses import dataclass

import pytest

from tiue.distill.config import DistillConfig, preset_names, read_preset
from tiue.settings import add_flags, check, given, setting, with_flags


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_valid_and_names_differences_only(name):
    settings = read_preset(name)
    defaults = dataclasses.asdict(DistillConfig())
    assert settings and all(defaults[name] != value for name, value in settings.items())
    DistillConfig(**settings)


def test_a_distillation_of_stable_diffusion_has_the_settings_of_the_paper():
    settings = dataclasses.asdict(DistillConfig(**read_preset("sd21-base")))
    paper = {"steps": (4,), "iterations": 66_500, "batch_size": 8, "grad_clip": 1.0}
    paper |= {"learning_rate": 1e-6, "fake_learning_rate": 1e-3, "learning_rate_decay": "none", "fake_steps": 1}
    paper |= {"guidance": 4.5, "fake_guidance": 4.5, "t_min": 20, "t_max": 980, "kl_weight": 0.8, "clip_weight": 0.0}
    paper |= {"fake_score": "lora", "lora_rank": 64, "lora_alpha": 108, "null_probability": 0.1, "optimizer": "adam"}
    assert {name: settings[name] for name in paper} == paper


@pytest.mark.parametrize(
    ("setting", "name", "expected", "received"),
    [
        ('"learning_rate": "1e-6"', "learning_rate", "a number above 0", "'1e-6'"),
        ('"steps": "4"', "steps", "whole numbers of at least 1", "'4'"),
        ('"steps": 4.5', "steps", "whole numbers of at least 1", "4.5"),
        ('"steps": 0', "steps", "whole numbers of at least 1", "(0,)"),
        ('"steps": []', "steps", "at least one", "none"),
        ('"batch_size": true', "batch_size", "a whole number of at least 1", "True"),
        ('"grad_clip": null', "grad_clip", "a number above 0", "None"),
        ('"compile": 1', "compile", "true or false", "1"),
        ('"fake_score": 1', "fake_score", "one of lora, full", "1"),
        ('"fake_score": "half"', "fake_score", "one of lora, full", "'half'"),
        ('"guidance": Infinity', "guidance", "a number of at least 0", "inf"),
        ('"ema_decay": 1.5', "ema_decay", "a number of at least 0 and at most 1", "1.5"),
        ('"t_min": 990', "t_min", "not exceed `t_max`", "990 and 980"),
        ('"seed": 1000000000001', "seed", "a whole number of at least 0 and at most 1e+12", "1000000000001"),
        (f'"guidance": 1{"0" * 400}', "guidance", "a number of at least 0", f"1{'0' * 95} ..."),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, setting, name, expected, received):
    (tmp_path / "preset.json").write_text(f"{{{setting}}}")
    with pytest.raises(ValueError) as error:
        DistillConfig(**read_preset(tmp_path / "preset.json"))
    message = str(error.value)
    assert message.startswith(f"`{name}` ") and expected in message and message.endswith(f"got {received}")


def test_a_whole_number_will_do_for_a_real_one(tmp_path):
    (tmp_path / "preset.json").write_text(json.dumps({"guidance": 2}))
    assert DistillConfig(**read_preset(tmp_path / "preset.json")).guidance == 2.0


def test_a_preset_nested_too_deep_is_no_preset(tmp_path):
    (tmp_path / "preset.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"preset\.json: not valid JSON"):
        read_preset(tmp_path / "preset.json")


@dataclass(frozen=True)
class Settings:
    """One setting of each kind, and a field that is none."""

    size: int = setting(64, "height and width", group="the picture", at_least=8)
    strength: float | None = setting(None, "100 % is 1", above=0, at_most=1, aliases=["s"], shown="by the model")
    kinds: tuple[str, ...] = setting((), "decoders", choices=["kl", "tiny"], group="the decoder")
    tiling: bool = setting(False, "in tiles")
    model: object = None

    def __post_init__(self):
        check(self)


def parsed(*flags: str) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings)
    return given(parser.parse_args(flags), Settings)


def test_flags_are_made_from_the_fields():
    assert parsed() == {}
    assert parsed("--size", "8", "--s", "0.5", "--kinds", "tiny,kl", "--tiling") == {
        "size": 8,
        "strength": 0.5,
        "kinds": ("tiny", "kl"),
        "tiling": True,
    }
    assert Settings(**parsed("--no-tiling")) == Settings()


def test_the_help_has_groups_defaults_and_no_field_that_is_no_setting():
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings)
    text = parser.format_help()
    assert "the picture:" in text and "the decoder:" in text and "--model" not in text
    assert "height and width (default 64)" in text and "100 % is 1 (default by the model)" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 4}, "`size` must be a whole number of at least 8, got 4"),
        ({"size": 10**200}, None),
        ({"strength": math.nan}, "`strength` must be a number above 0 and at most 1 or None, got nan"),
        ({"kinds": ("kl", "vq")}, "`kinds` must be some of kl, tiny, got ('kl', 'vq')"),
        ({"kinds": "kl"}, "`kinds` must be some of kl, tiny, got 'kl'"),
    ],
)
def test_a_setting_out_of_range_is_refused(values, message):
    if message is None:
        assert Settings(**values)
        return
    with pytest.raises(ValueError) as error:
        Settings(**values)
    assert str(error.value) == message


def test_a_long_value_is_shortened():
    with pytest.raises(ValueError) as error:
        Settings(size="x" * 10_000)
    assert len(str(error.value)) < 200


def test_a_command_line_shows_flags_for_names_in_backquotes():
    message = "`kinds` needs `tiny_vae`, got kinds"
    assert with_flags(message, Settings) == "--kinds needs `tiny_vae`, got kinds"


@pytest.mark.parametrize("flags", [["--size", "x"], ["--kinds", ""]])
def test_a_text_that_is_no_value_is_refused_by_its_flag(capsys, flags):
    if flags == ["--kinds", ""]:
        with pytest.raises(ValueError, match="`kinds` must be some of kl, tiny"):
            Settings(**parsed(*flags))
        return
    with pytest.raises(SystemExit):
        parsed(*flags)
    assert "argument --size: expected a whole number, got 'x'" in capsys.readouterr().err
