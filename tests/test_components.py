import json

import pytest
import tiny
import torch

from tiue.components import ComponentsError, encode_text, load_components, tokenize


@pytest.fixture
def directory(tmp_path):
    return tiny.save_pipeline(tiny.sd15(), tmp_path / "pipeline")


@pytest.mark.parametrize("make", [tiny.sd15, tiny.emoji])
@torch.no_grad()
def test_a_pipeline_directory_is_read_back(make, tmp_path):
    original = make()
    (tiny.save_pipeline(original, tmp_path) / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    loaded = load_components(tmp_path)
    assert (loaded.name, loaded.licence) == (tmp_path.name, "mit")
    prompts = ["a cat", ""]
    assert torch.equal(encode_text(loaded, prompts), encode_text(original, prompts))
    for part in ("unet", "vae"):
        a, b = getattr(loaded, part).state_dict(), getattr(original, part).state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)


@torch.no_grad()
def test_the_mask_is_used_where_the_text_encoder_asks_for_it():
    assert tokenize(tiny.sd15(), ["a cat"])[1] is None
    components = tiny.emoji()
    ids, mask = tokenize(components, ["a cat", "x" * 100])
    assert ids.shape == mask.shape == (2, 32)
    assert mask.sum(1).tolist() == [7, 32]
    unmasked = components.text_encoder(input_ids=ids)[0]
    assert not torch.allclose(encode_text(components, ["a cat", "x" * 100])[0], unmasked[0])


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(directory, part):
    (directory / part).rename(directory / "elsewhere")
    with pytest.raises(ComponentsError, match=rf"not a complete diffusers pipeline: {part}"):
        load_components(directory)


def test_an_unnamed_or_unsupported_part_is_named(directory):
    index = json.loads((directory / "model_index.json").read_text())
    for part, value, message in (
        ("vae", [None, None], "names no vae"),
        (
            "vae",
            ["diffusers", "VQModel"],
            "VQModel is not supported: expected AutoencoderKL or AutoencoderTiny",
        ),
        ("text_encoder", ["os", "system"], "system is not supported"),
    ):
        (directory / "model_index.json").write_text(json.dumps(index | {part: value}))
        with pytest.raises(ComponentsError, match=message):
            load_components(directory)


def test_pickles_are_not_read(directory):
    weights = directory / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ComponentsError, match="unet cannot be loaded"):
        load_components(directory)


def test_no_directory_is_not_taken_for_a_hub_id():
    with pytest.raises(ComponentsError, match="no such pipeline directory: some/model"):
        load_components("some/model")
