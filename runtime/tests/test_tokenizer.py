"""tokenizer.json: accepted files, files that are refused before the library reads them, and prompts of any length."""

import base64
import functools
import json
import random
import struct

import numpy as np
import pytest
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle, write_bundle
from tiue_runtime.bundle.tokenizer_json import read_tokenizer
from tiue_runtime.errors import BundleError, RequestError
from tiue_runtime.tokenizer import CHARACTERS_PER_TOKEN, MOST_CHARACTERS, PromptTokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LENGTH = 8
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def finish(tokenizer, path, direction="right"):
    tokenizer.enable_padding(length=LENGTH, pad_id=0, pad_token="<pad>")
    tokenizer.enable_truncation(LENGTH, direction=direction)
    tokenizer.save(str(path))
    return path


def clip():
    characters = list(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", *characters, *(f"{c}</w>" for c in characters), "ca", "cat</w>", "<start>", "<end>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("c", "a"), ("ca", "t</w>")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<end>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(False)]
    )
    ends = ("<end>", vocabulary["<end>"]), ("<start>", vocabulary["<start>"])
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def bert():
    tokens = ["<pad>", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "##s", "dog", "猫"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    return tokenizer


def t5():
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("▁cat", -4.0), ("s", -5.0)]
    tokenizer = Tokenizer(models.Unigram(scores, 2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


FAMILIES = {"clip": clip, "bert": bert, "t5": t5}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizers_of_known_text_encoders_are_accepted(tmp_path, family):
    path = finish(FAMILIES[family](), tmp_path / "tokenizer.json")
    made = PromptTokenizer(path, LENGTH)(["a cat", ""])
    assert made.input_ids.shape == made.attention_mask.shape == (2, LENGTH)
    assert made.input_ids[0].tolist() == Tokenizer.from_file(str(path)).encode("a cat").ids


def put(path, value):
    def change(content):
        *parents, last = path.split("/")
        for parent in parents:
            content = content[parent]
        content[last] = value

    return change


def sequence(kind, name, parts):
    return put(kind, {"type": "Sequence", name: parts})


DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LOWER = {"type": "Lowercase"}
WRONG = {
    "padding to a multiple": (
        put("padding/pad_to_multiple_of", 2**40),
        r"padding\.pad_to_multiple_of: got 1099511627776",
    ),
    "padding to the longest": (put("padding/strategy", "BatchLongest"), "padding to None"),
    "endless padding": (put("padding/strategy", {"Fixed": 2**40}), "padding to 1099511627776"),
    "true for a length": (put("truncation/max_length", True), "truncation to True"),
    "a stride": (put("truncation/stride", 7), r"truncation\.stride: got 7"),
    "a pad id that is no token": (
        put("padding/pad_id", 99),
        r"padding\.pad_id: expected an id of the vocabulary, got 99",
    ),
    "an own token that is none": (
        put("post_processor/special_tokens/<end>/ids", [99]),
        "post_processor: expected an id of the vocabulary, got 99",
    ),
    "a second text": (
        put("post_processor/single", [{"Sequence": {"id": "B", "type_id": 0}}]),
        r"post_processor\.single: got",
    ),
    "more ids than tokens": (
        put("post_processor/special_tokens/<end>/ids", [2, 2]),
        r"post_processor\.special_tokens: got",
    ),
    "more own tokens than fit": (
        put("post_processor/single", [{"SpecialToken": {"id": "<end>", "type_id": 0}}] * 9),
        "post_processor: expected at most 8 tokens, got 9",
    ),
    "forty doublings": (sequence("normalizer", "normalizers", [DOUBLING] * 40), "normalizers: got"),
    "a doubling": (put("normalizer", DOUBLING), "normalizer: expected a known replacement"),
    "a slow pattern": (
        put("normalizer", {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""}),
        "normalizer: expected a known replacement",
    ),
    "a slow split": (
        put(
            "pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a*)*b"}, "behavior": "Isolated", "invert": False}
        ),
        r"pre_tokenizer\.pattern: got",
    ),
    "sequences in sequences": (
        sequence("normalizer", "normalizers", [{"type": "Sequence", "normalizers": [LOWER]}]),
        r"normalizer\.normalizers\[0\]: expected one of .*, got 'Sequence'",
    ),
    "an unknown normalizer": (put("normalizer", {"type": "Prepend", "prepend": "x"}), "normalizer: expected one of"),
    "an unknown field": (put("normalizer", {"type": "Lowercase", "x": 1}), "normalizer: expected no field 'x'"),
    "an unknown pre-tokenizer": (put("pre_tokenizer", {"type": "UnicodeScripts"}), "pre_tokenizer: expected one of"),
    "an unknown model": (put("model/type", "Magic"), "model: expected one of WordLevel, .*, got 'Magic'"),
    "no model": (put("model", None), "model: expected an object, got None"),
    "an id below zero": (put("model/vocab/a", -1), r"model\.vocab: got"),
    "an id that is true": (put("model/vocab/a", True), r"model\.vocab: got"),
    "an unknown part": (put("trainer", {}), "expected no field 'trainer'"),
    "an added token without characters": (
        put("added_tokens", [{"id": 1, "content": ""}]),
        r"added_tokens\[0\]\.content",
    ),
    "a deep list": (put("version", functools.reduce(lambda inner, _: [inner], range(90), [])), "version: got"),
}


@pytest.fixture
def change_tokenizer(copy):
    def apply(change):
        path = copy / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return apply


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_refused_before_the_library_sees_it(change_tokenizer, monkeypatch, change, message):
    path = change_tokenizer(change)
    monkeypatch.setattr("tiue_runtime.tokenizer.Tokenizer", None)
    with pytest.raises(BundleError, match=message) as caught:
        PromptTokenizer(path, LENGTH)
    text = str(caught.value).replace(str(path), "")
    assert text.isprintable() and len(text) < 500


def test_the_library_refuses_a_missing_field(change_tokenizer):
    path = change_tokenizer(lambda content: content["post_processor"].pop("single"))
    with pytest.raises(BundleError, match="the tokenizer failed"):
        PromptTokenizer(path, LENGTH)


def test_a_pipe_is_refused_without_waiting(copy):
    os = pytest.importorskip("posix")
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    with pytest.raises(BundleError, match="expected a regular file"):
        read_tokenizer(copy / "tokenizer.json", LENGTH)


# What SentencePiece 0.2.3 writes for the rules ａ => a, ① => 1, é => e, ﬁ => fi; all other units are unused.
UNITS = {
    0: 0x30800, 1: 0x2A8C3, 2: 0x5A9, 3: 0x80000004, 4: 0x28491, 5: 0xDA0, 6: 0x80000000, 7: 0x3981, 8: 0x238AC,
    9: 0x80000006, 10: 0x581, 11: 0x80000002, 25: 0x248BD, 32: 0x2D4E2, 45: 0x224EF,
}  # fmt: skip
TEXTS = b"1\0a\0e\0fi\0"


def charsmap(units=UNITS, texts=TEXTS, count=256):
    """A table of characters, as SentencePiece writes it, in base64."""
    trie = struct.pack(f"<{count}I", *[units.get(i, 0) for i in range(count)])
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + texts).decode()


def precompiled(text):
    return put("normalizer", {"type": "Precompiled", "precompiled_charsmap": text})


def test_a_charsmap_of_sentencepiece_is_accepted(change_tokenizer):
    tokenizer = PromptTokenizer(change_tokenizer(precompiled(charsmap())), LENGTH)
    written, meant = tokenizer(["ａ ｒed heart", "a red heart"]).input_ids  # noqa: RUF001
    assert written[1] == meant[1] and written[2] != meant[2], "one of the letters has a rule"


@pytest.mark.parametrize(
    "text",
    [
        charsmap(dict.fromkeys(range(256), 1023 << 10 | 1 << 8)),
        charsmap({**UNITS, 0: 256 << 10}),
        charsmap({**UNITS, 45: 0x224EF | 1 << 9}),  # an offset that is 256 times as far
        charsmap({**UNITS, 11: 0x80000000 + len(TEXTS) + 1}),
        charsmap({**UNITS, 11: 0x80000001}, "é\0".encode()),
        charsmap(count=255),
        charsmap(count=260),
        charsmap(count=0),
        charsmap(texts=b"\xff\0"),
        charsmap()[:1000],
        base64.b64encode(b"\xff\xff\xff\xff" + bytes(1024)).decode(),
        "AAAA",
        "",
        "%%%%",
        "é" * 1400,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_a_charsmap_that_leads_nowhere_is_refused_before_the_library_panics(change_tokenizer, capfd, text):
    with pytest.raises(BundleError, match=r"normalizer\.precompiled_charsmap: got .*, which the exporter does not"):
        PromptTokenizer(change_tokenizer(precompiled(text)), LENGTH)
    assert not capfd.readouterr().err, "a panic of the library prints a report"


def test_no_damaged_charsmap_that_is_accepted_makes_the_library_panic(change_tokenizer, capfd):
    draw, accepted = random.Random(1), 0
    for _ in range(300):
        units = dict(UNITS)
        for _ in range(draw.choice([1, 1, 2, 4])):
            units[draw.choice([*UNITS, draw.randrange(256)])] = draw.getrandbits(draw.choice([12, 20, 32]))
        try:
            tokenizer = PromptTokenizer(change_tokenizer(precompiled(charsmap(units))), LENGTH)
        except BundleError:
            continue
        accepted += 1
        tokenizer(["".join(map(chr, range(1, 0x800))), "ａ①éﬁ\u3000\U0001f600", "\0"])
    assert accepted > 20
    assert not capfd.readouterr().err


def encoding_with(monkeypatch, bundle, encode):
    """A tokenizer of a bundle, whose library encodes texts by a function of the library's tokenizer and the text."""

    class Library:
        def __init__(self, text):
            self._tokenizer = Tokenizer.from_str(text)
            self.truncation = self._tokenizer.truncation

        from_str = classmethod(lambda cls, text: cls(text))

        def encode(self, text):
            return encode(self._tokenizer, text)

    monkeypatch.setattr("tiue_runtime.tokenizer.Tokenizer", Library)
    return PromptTokenizer(bundle / "tokenizer.json", LENGTH)


def test_a_panic_of_the_library_is_a_bundle_error(tiny, monkeypatch):
    broken = base64.b64decode(charsmap(dict.fromkeys(range(256), 1023 << 10 | 1 << 8)))
    tokenizer = encoding_with(
        monkeypatch, tiny, lambda library, text: normalizers.Precompiled(broken).normalize_str(text)
    )
    with pytest.raises(BundleError, match="the tokenizer failed"):
        tokenizer(["a red heart"])


def test_an_interrupt_is_no_failure_of_the_tokenizer(tiny, monkeypatch):
    def interrupt(library, text):
        raise KeyboardInterrupt

    tokenizer = encoding_with(monkeypatch, tiny, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenizer(["a"])


def test_unknown_words_without_an_unknown_token(change_tokenizer):
    path = change_tokenizer(put("model/unk_token", "none"))
    with pytest.raises(BundleError, match="the tokenizer failed"):
        PromptTokenizer(path, LENGTH)(["green"])


def test_ids_beyond_the_embeddings_are_an_inference_error(copy, change_tokenizer):
    manifest = Bundle.load(copy).manifest
    change_tokenizer(put("model/vocab/a", 2**31 - 1))
    write_bundle(copy, manifest)
    with pytest.raises(ValueError, match="text_encoder failed on cpu"):
        Pipeline.load(copy, device="cpu")("a red heart", seed=1)


def test_half_a_character_is_a_request_error(tiny):
    with pytest.raises(RequestError, match="prompt: expected whole characters"):
        PromptTokenizer(tiny / "tokenizer.json", LENGTH)(["a\ud800"])


def texts():
    """Prompts longer than the first window, with characters that make tokens long, short or absent."""
    draw = random.Random(0)
    pieces = [
        "a",
        "cat",
        "cats ",
        "cat" * 50,
        " ",
        " " * 100,
        "\n",
        "猫",
        "é",
        "e\u0301",
        "'",
        "\u200d",
        "\x00",
        "7",
        "Σ",
        "x" * 300,
    ]
    for _ in range(60):
        chosen = draw.sample(pieces, draw.randint(1, 5))
        yield "".join(draw.choice(chosen) for _ in range(draw.randint(100, 4000)))
    yield from (" " * 20_000 + "a cat", "x" * 20_000 + " a cat", "a cat" + " " * 20_000 + "a cat", "\u0301" * 20_000)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompts_give_the_tokens_of_the_whole_prompt(tmp_path, family):
    """Reading in windows changes neither the tokens nor the part that is reported as cut off."""
    path = finish(FAMILIES[family](), tmp_path / "tokenizer.json")
    windowed, library = PromptTokenizer(path, LENGTH), Tokenizer.from_file(str(path))
    prompts = [text for text in texts() if len(text) > CHARACTERS_PER_TOKEN * LENGTH]
    assert len(prompts) > 40
    for prompt in prompts:
        made, whole = windowed([prompt]), library.encode(prompt)
        assert made.input_ids[0].tolist() == whole.ids
        starts = [
            start
            for part in whole.overflowing
            for (start, end), special in zip(part.offsets, part.special_tokens_mask, strict=True)
            if end > start and not special
        ]
        assert made.cut[0] == (prompt[min(starts) :].strip() if starts else "")


def test_long_prompts_are_not_encoded_whole(tiny, monkeypatch):
    read = []
    tokenizer = encoding_with(monkeypatch, tiny, lambda library, text: read.append(len(text)) or library.encode(text))
    made = tokenizer(["a red heart " * 10**6])
    assert sum(read) <= CHARACTERS_PER_TOKEN * LENGTH and len(made.cut[0]) > 10**7
    assert np.array_equal(made.input_ids, tokenizer(["a red heart " * 3]).input_ids)
    read.clear()
    assert tokenizer([" " * 10**7 + "a heart"]).cut == ("a heart",)
    assert max(read) == MOST_CHARACTERS


def test_truncation_from_the_left_keeps_the_end(tmp_path):
    tokenizer = PromptTokenizer(finish(bert(), tmp_path / "tokenizer.json", direction="left"), LENGTH)
    made = tokenizer(["dog " * 10 + "a cat a cat a cat", "a cat"])
    assert made.input_ids[0].tolist() == [2, 4, 5, 4, 5, 4, 5, 3]
    assert made.cut == (("dog " * 10).strip(), "")
