"""Warnings about sizes that a model was not made for."""

import warnings
from dataclasses import replace

import pytest
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle, write_bundle
from tiue_runtime.tools.cli import main


@pytest.fixture
def pipe(copy):
    """Of 12x8 (the default) and 16x12."""
    write_bundle(copy, replace(Bundle.load(copy).manifest, sizes=((12, 16),)))
    return Pipeline.load(copy, device="cpu")


def test_each_other_size_warns_once_where_it_was_asked_for(pipe):
    expected = r"^width, height: the model was made for pictures of 12x8, 16x12; at 8x12 it may draw nothing"
    with pytest.warns(UserWarning, match=expected) as caught:
        pipe("a red heart", width=8, height=12)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a red heart", width=8, height=12)
        with pytest.raises(UserWarning, match="at 16x16"):
            pipe("a red heart", width=16, height=16)


@pytest.mark.parametrize("size", [{}, {"width": 12}, {"width": 16, "height": 12}])
def test_sizes_of_the_bundle_are_silent(pipe, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a red heart", **size)


def test_the_size_of_latents_counts(pipe):
    z_0 = pipe("a red heart", output_type="latent").images
    with pytest.warns(UserWarning, match="at 8x8"):
        pipe("a red heart", latents=z_0[:, :, :4, :4])


def test_the_command_line_warns_in_one_line_with_flags(tiny, tmp_path, capsys):
    flags = ["--bundle", str(tiny), "--width", "16", "--num-images", "2", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "a red heart", *flags]) == 0
    said = capsys.readouterr().err
    assert said.startswith("tiue-runtime: warning: --width, --height: the model was made for pictures of 12x8; at 16x8")
    assert said.count("\n") == 1


def test_info_names_the_sizes(pipe, capsys):
    assert main(["info", "--bundle", str(pipe.bundle.directory)]) == 0
    assert "12x8, 16x12; others are multiples of 4 and get a warning\n" in capsys.readouterr().out
