"""Tokens of prompts with characters that nobody sees: those of the tokenizer that a pipeline names."""

import json
import shutil

import pytest
import tiny
from tiue_runtime.tokenizer import PromptTokenizer
from tokenizers import Tokenizer
from transformers import BertTokenizer, BertTokenizerFast, CLIPTokenizer, CLIPTokenizerFast

from export.onnx import main as export
from tiue.checkpoint import Student, load_student, save_student
from tiue.components import load_components

PROMPTS = [
    "",
    "a cat",
    "A CAT, AT!",
    "a\u200dcat",  # zero-width joiner
    "a\u200bcat",  # zero-width space
    "a\u200ccat",  # zero-width non-joiner
    "a\u00adcat",  # soft hyphen
    "a\u2060cat",  # word joiner
    "\ufeffcat",  # byte order mark
    "a\ufffdcat",  # replacement character
    "a\x00cat",
    "a\x07cat",
    "a\x1bcat",
    "\x7fa cat",
    "a\x80\x9fcat",
    "\x1ca cat",
    "a\tcat\nat\r\nhat",
    "a\x0bcat\x0chat",
    "a\u0085cat",  # next line
    "a\u00a0cat",  # no-break space
    "a\u3000cat",  # ideographic space
    "a\u2009cat\u202fat",  # thin spaces
    "a\u2028cat\u2029hat",  # line and paragraph separators
    "\u180ecat",  # Mongolian vowel separator
    "a\u200ecat\u200f",  # marks of direction
    "\u202acat\u202e at\u202c",  # embedding and override
    "\u2066cat\u2069",  # isolates
    "\u2764\ufe0f cat",  # variation selectors
    "\u2764\ufe0e cat",
    "\U0001f469\u200d\U0001f680",  # emoji sequences
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 cat",
    "\U0001f44d\U0001f3fd",
    "\U0001f1e9\U0001f1ea",
    "1\ufe0f\u20e3",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f",  # tag characters
    "cafe\u0301",  # combining marks
    "e\u0301\u0323 a\u0300\u0316",
    "a\u0345cat",  # a letter only where case does not count
    "a\u034fcat",  # combining grapheme joiner
    "\u1100\u1161\u11a8",  # letters of a Korean syllable
    "\u65e5\u672c\u8a9e",
    "a\u732bcat\u732b\u732b",
    "\ud55c\uad6d\uc5b4",
    "\u039f\u0394\u039f\u03a3 \u03a3\u0391\u03a3.",  # final sigmas
    "\u0391\u0301\u03a3\u0391 \u03a3",
    "\u0130stanbul \u1e9e",
    "\ufb01sh \u00bd \u00b2",
    "\ue000cat",  # private use
    "\u0628\u064b\u0640 \u05d0\u05b8",
    "it's IT'S 'S",
    "a1b22 \u0661",
    "cat<|endoftext|>at <|startoftext|>",
    "[CLS] cat[SEP]",
    " ".join(["long\u200d"] * 30),
]
# Neither tokenizer reads these code points as characters. Which of them are assigned depends on the version of Unicode.
UNASSIGNED = ["a\uffffcat", "\U0001ffff", "\u0378 cat"]


def named(directory, name):
    """A pipeline directory with CLIP's tokenizer, whose index names a class."""
    tiny.save_pipeline(tiny.sd15(), directory)
    tiny.save_clip_tokenizer(directory / "tokenizer", "<|endoftext|>")
    tiny.edit_json(directory / "model_index.json", tokenizer=["transformers", name])
    return directory


def padded(tokenizer, prompt):
    return tokenizer(prompt, padding="max_length", truncation=True, max_length=20).input_ids


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return named(tmp_path_factory.mktemp("clip"), "CLIPTokenizer")


@pytest.mark.parametrize("prompt", PROMPTS + UNASSIGNED, ids=ascii)
def test_clip_gives_the_tokens_of_the_slow_class_that_the_pipeline_names(directory, prompt):
    slow = CLIPTokenizer.from_pretrained(directory / "tokenizer")
    assert padded(load_components(directory).tokenizer, prompt) == padded(slow, prompt)


def test_the_same_tokens_come_from_a_student_and_from_its_tokenizer_json(directory, tmp_path):
    slow = CLIPTokenizer.from_pretrained(directory / "tokenizer")
    components = load_components(directory)
    save_student(tmp_path / "student.safetensors", Student(components, 751, {1: [751]}))
    loaded = load_student(tmp_path / "student.safetensors").components.tokenizer
    exported = Tokenizer.from_str(components.tokenizer.backend_tokenizer.to_str())
    for prompt in PROMPTS:
        assert loaded(prompt).input_ids == exported.encode(prompt).ids == slow(prompt).input_ids


@pytest.mark.usefixtures("traced_once")
def test_the_runtime_gives_the_same_tokens_from_an_exported_bundle(tmp_path):
    tiny.save_original_sd15(tmp_path / "sd15")
    tiny.edit_json(tmp_path / "sd15" / "model_index.json", safety_checker=[None, None])
    for part in ("unet", "vae"):  # those whose graphs are traced already
        shutil.rmtree(tmp_path / "sd15" / part)
        getattr(tiny.sd15(), part).save_pretrained(tmp_path / "sd15" / part)
    assert export(["--ckpt", str(tmp_path / "sd15"), "--steps", "4", "--out", str(tmp_path / "bundle")]) == 0
    slow = CLIPTokenizer.from_pretrained(tmp_path / "sd15" / "tokenizer")
    exported = PromptTokenizer(tmp_path / "bundle" / "tokenizer.json", 20)
    for prompt in PROMPTS:
        assert exported([prompt]).input_ids.tolist() == [padded(slow, prompt)]


def test_the_fast_class_stays_as_it_is_where_the_pipeline_names_it(tmp_path):
    directory = named(tmp_path, "CLIPTokenizerFast")
    fast, loaded = CLIPTokenizerFast.from_pretrained(directory / "tokenizer"), load_components(directory).tokenizer
    assert all(padded(loaded, prompt) == padded(fast, prompt) for prompt in PROMPTS)


def test_a_clip_tokenizer_is_written_with_few_kinds_of_normalizers(directory):
    """The runtime accepts these kinds and no others."""
    content = json.loads(load_components(directory).tokenizer.backend_tokenizer.to_str())
    kinds = [step["type"] for step in content["normalizer"]["normalizers"]]
    assert kinds == ["BertNormalizer", "Replace", "NFC", "Replace", "Replace", "Lowercase"]


def test_bert_gives_the_tokens_of_its_slow_class(tmp_path):
    letters = [chr(c) for c in range(33, 127)] + list("αβδοςσ猫日本語éàüß½²ﬁ❤👩🚀👍🇩🇪あ한국어بא")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    slow, fast = (cls(str(tmp_path / "vocab.txt")) for cls in (BertTokenizer, BertTokenizerFast))
    exported = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    differing = [prompt for prompt in PROMPTS if exported.encode(prompt).ids != slow(prompt).input_ids]
    assert differing == []
