import json
from dataclasses import replace

import pytest
import tiny
import torch
from fuzz import students

from tiue.checkpoint import CheckpointError, Student, check_savable, load_student
from tiue.components import ComponentsError
from tiue.files import OneLineError
from tiue.plausible import check_runs
from tiue.sizes import check_sizes
from tiue.unet import TiUE


@pytest.fixture
def changed(tmp_path):
    """changed(part, name=value, ...) writes a student file of which configurations differ from the weights."""

    def write(part, **options):
        header, tensors = students.whole()
        metadata = dict(header["__metadata__"])
        metadata[part] = json.dumps({**json.loads(metadata[part]), **options})
        path = tmp_path / students.NAME
        path.write_bytes(students.written(json.dumps({**header, "__metadata__": metadata}).encode(), tensors))
        return path

    return write


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("text_encoder", "num_hidden_layers", 20_000),
        ("text_encoder", "vocab_size", 2**40),
        ("unet", "layers_per_block", 20_000),
        ("unet", "transformer_layers_per_block", [20_000, 1]),
        ("unet", "sample_size", 10**5000 // 10**4000),
        ("vae", "layers_per_block", 20_000),
    ],
)
def test_a_configuration_of_a_far_larger_model_is_refused_before_it_is_built(changed, part, option, value):
    with pytest.raises(CheckpointError, match=rf"{part}\.{option} is .*: expected at most"):
        load_student(changed(part, **{option: value}))


def test_sizes_of_real_models_are_accepted():
    unet = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "sample_size": 96}
    check_sizes({"unet": unet, "text": {"vocab_size": 250_112, "num_hidden_layers": 24}}, [[320]] * 100)


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [("unet", "norm_num_groups", 0), ("unet", "act_fn", {"a": 1}), ("text_encoder", "hidden_act", "nothing")],
)
def test_whatever_libraries_raise_for_a_configuration_becomes_one_line(changed, part, option, value):
    with pytest.raises(CheckpointError, match="malformed metadata"):
        load_student(changed(part, **{option: value}))


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [("unet", "freq_shift", [1]), ("vae", "scaling_factor", "x"), ("vae", "scaling_factor", 0)],
)
def test_a_student_that_cannot_make_a_picture_is_refused_before_a_run(changed, part, option, value):
    student = load_student(changed(part, **{option: value}))
    with pytest.raises(CheckpointError, match=r"cannot be exported: the (model does not run|VAE's scaling_factor)"):
        check_savable(student)


@pytest.mark.parametrize("kind", [tiny.sd15, tiny.v_prediction, tiny.emoji])
def test_models_that_run_are_accepted_without_reading_a_weight(kind):
    components = kind()
    network = Student(components, 751, {1: [751]}).tiue()
    with torch.no_grad():
        for module in (components.unet, components.vae, components.text_encoder):
            for parameter in module.parameters():
                parameter.fill_(torch.nan)  # numbers that would show
    check_runs(components, network)


def test_a_tokenizer_that_is_longer_than_the_text_encoder_takes_does_not_run():
    components = tiny.sd15()
    components.tokenizer.model_max_length = 500
    network: TiUE = Student(components, 751, {1: [751]}).tiue()
    with pytest.raises(ComponentsError, match="does not run"):
        check_runs(replace(components), network)


def test_messages_about_files_are_one_line_whatever_they_quote():
    error = OneLineError(f"has an unexpected tensor a\nb\x1b[31m{'x' * 5000}")
    assert str(error).isprintable() and len(str(error)) <= 1000 and r"a b\x1b[31mxxx" in str(error)
