import dataclasses
import os
import shutil
from collections import namedtuple

import pytest
import tiny
import torch
from accelerate import Accelerator
from tolerances import BFLOAT16, EMBEDDINGS

from tiue.distill import embeddings as text
from tiue.distill.embeddings import EncodedTexts, cache_texts, cut_prompts

PROMPTS = [f"a picture of {i}" for i in range(150)]  # three batches


@pytest.fixture(scope="module")
def components():
    return tiny.emoji()


def cached(components, directory, prompts=PROMPTS, digest="0"):
    return cache_texts(components, prompts, digest, directory, Accelerator(cpu=True))


def test_cached_embeddings_are_those_of_the_encoder(components, tmp_path):
    chosen = [149, 3, 70]
    values = cached(components, tmp_path).rows(chosen)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, EncodedTexts(components, PROMPTS).rows(chosen), atol=EMBEDDINGS, rtol=0)


def test_a_second_run_encodes_nothing(components, tmp_path, monkeypatch):
    before, asked = cached(components, tmp_path).rows(range(150)), []
    rows = EncodedTexts.rows
    monkeypatch.setattr(EncodedTexts, "rows", lambda self, indices: asked.append(len(indices)) or rows(self, indices))
    assert torch.equal(cached(components, tmp_path).rows(range(150)), before)
    assert asked == [1]  # to see the shape


def test_what_was_stopped_goes_on(components, tmp_path, monkeypatch):
    """After the first batch the process ends; the next encodes the other two."""
    asked = []

    class Stopping(EncodedTexts):
        def rows(self, indices):
            asked.append(len(indices))
            if len(asked) == 3:  # the example, a batch, and then
                raise KeyboardInterrupt
            return super().rows(indices)

    monkeypatch.setattr(text, "NOTE_EVERY", 1)
    monkeypatch.setattr(text, "EncodedTexts", Stopping)
    with pytest.raises(KeyboardInterrupt):
        cached(components, tmp_path)
    values = cached(components, tmp_path).rows(range(150))
    assert asked == [1, 64, 64, 1, 64, 22]
    torch.testing.assert_close(values, EncodedTexts(components, PROMPTS).rows(range(150)), atol=EMBEDDINGS, rtol=0)


@pytest.mark.parametrize("harm", ["lost", "cut"])
def test_a_cache_whose_file_is_damaged_is_made_anew(components, tmp_path, harm):
    before = cached(components, tmp_path).rows(range(150))
    path = tmp_path / "embeddings.bin"
    path.unlink() if harm == "lost" else os.truncate(path, 1000)
    assert torch.equal(cached(components, tmp_path).rows(range(150)), before)


@pytest.mark.parametrize("change", ["prompts", "text encoder"])
def test_a_cache_of_something_else_is_made_anew(components, tmp_path, change):
    cached(components, tmp_path)
    prompts, digest = PROMPTS, "0"
    if change == "prompts":
        prompts, digest = PROMPTS[::-1], "1"
    else:
        components = tiny.emoji()
        with torch.no_grad():
            next(components.text_encoder.parameters()).mul_(2.0)
    values = cached(components, tmp_path, prompts, digest).rows([0])
    torch.testing.assert_close(values, EncodedTexts(components, prompts).rows([0]), atol=EMBEDDINGS, rtol=0)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(components, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(
        ValueError, match=r"text embeddings of 150 prompts take 0\.0 GB, and 0\.0 GB are free.*`text_cache` off"
    ):
        cached(components, tmp_path)
    assert not list(tmp_path.iterdir())


def test_prompts_over_the_limit_are_counted(components):
    limit = components.tokenizer.model_max_length
    assert cut_prompts(components, ["x", "x " * (limit + 1), "a heart"]) == 1


def test_mixed_precision_keeps_what_the_unet_rounds_to(components, tmp_path):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    values = cache_texts(dataclasses.replace(components), PROMPTS[:2], "0", tmp_path, accelerator).rows([1])
    expected = EncodedTexts(components, PROMPTS).rows([1]).bfloat16().float()
    torch.testing.assert_close(values, expected, atol=BFLOAT16, rtol=BFLOAT16)
    assert torch.equal(values, values.bfloat16().float())
