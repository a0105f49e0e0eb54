"""tokenizer.json as the exporter writes it is what the runtime accepts."""

from dataclasses import replace

import pytest
import tiny
from tiue_runtime.errors import BundleError
from tiue_runtime.tokenizer import PromptTokenizer
from tokenizers import normalizers
from transformers import CLIPTokenizerFast

from export.assemble import write_tokenizer
from tiue.text_encoder import tokenize
from tiue.tokenization import load_tokenizer

PROMPTS = ["a cat", "Ein ΟΔΥΣΣΕΥΣ im Meer! " * 30, "", "a\u200dcat\u00ad 猫 e\u0301\ufffd"]


def clip(directory, like_slow):
    tiny.save_clip_tokenizer(directory, pad="<|endoftext|>")
    tokenizer = load_tokenizer(CLIPTokenizerFast, directory, like_slow=like_slow)
    return replace(tiny.sd15(), tokenizer=tokenizer)


MODELS = {
    "characters": lambda directory: tiny.emoji(),
    "CLIP, like the slow class": lambda directory: clip(directory, True),
    "CLIP, the fast class": lambda directory: clip(directory, False),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_runtime_gives_the_tokens_of_the_model(tmp_path, make):
    components = make(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, components)
    made = PromptTokenizer(path, components.tokenizer.model_max_length)(PROMPTS)
    ids, _ = tokenize(components, PROMPTS)
    assert made.input_ids.tolist() == ids.tolist()


def test_a_tokenizer_that_the_runtime_would_refuse_is_not_written(tmp_path):
    components = tiny.emoji()
    components.tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("x")
    with pytest.raises(BundleError, match=r"normalizer: expected one of .*, got 'Prepend'"):
        write_tokenizer(tmp_path / "tokenizer.json", components)
