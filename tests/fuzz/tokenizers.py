"""Damaged tokenizer.json: those of CLIP, BERT and T5 in small, with parts of other tokenizers between theirs."""

import base64
import json
from typing import Any

from hypothesis import strategies as st

from fuzz.cases import TEXTS, VALUES, Draw, edited_json

LENGTH = 8
_SPECIAL = ["<pad>", "<start>", "<end>", "<unknown>"]
_WORDS = [*_SPECIAL, *"abcdehrst", "▁", "▁a", "re", "red", "red</w>", "a</w>"]
_IDS = {word: i % 12 for i, word in enumerate(_WORDS)}  # the tiny bundle has 12 embeddings


def _whole(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": LENGTH, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": LENGTH},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
        "added_tokens": [
            {
                "id": i,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, word in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        **parts,
        "model": model,
    }


_CLIP = _whole(
    {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unknown>",
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": _IDS,
        "merges": [["r", "e"], ["re", "d</w>"]],
    },
    normalizer={
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    pre_tokenizer={
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"},
                "behavior": "Removed",
                "invert": True,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    post_processor={
        "type": "RobertaProcessing",
        "sep": ["<end>", 2],
        "cls": ["<start>", 1],
        "trim_offsets": False,
        "add_prefix_space": False,
    },
    decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
)
_BERT = _whole(
    {
        "type": "WordPiece",
        "unk_token": "<unknown>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": _IDS,
    },
    normalizer={
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    pre_tokenizer={"type": "BertPreTokenizer"},
    post_processor={
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<start>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<end>", "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": "<start>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<end>", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
            {"SpecialToken": {"id": "<end>", "type_id": 1}},
        ],
        "special_tokens": {
            "<start>": {"id": "<start>", "ids": [1], "tokens": ["<start>"]},
            "<end>": {"id": "<end>", "ids": [2], "tokens": ["<end>"]},
        },
    },
    decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
)
_T5 = _whole(
    {
        "type": "Unigram",
        "unk_id": 3,
        "vocab": [[word, -float(i)] for i, word in enumerate(_WORDS[:12])],
        "byte_fallback": False,
    },
    normalizer={
        "type": "Sequence",
        "normalizers": [
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode((1024).to_bytes(4, "little") + bytes(1024)).decode(),
            },
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ],
    },
    pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
)
_WORD_LEVEL = _whole(
    {"type": "WordLevel", "vocab": _IDS, "unk_token": "<unknown>"},
    normalizer={"type": "Lowercase"},
    pre_tokenizer={"type": "Whitespace"},
)
TOKENIZERS = [_WORD_LEVEL, _CLIP, _BERT, _T5]

# Parts that the library has and that could cost time or memory, or call for other files.
_PARTS: list[Any] = [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
    {"type": "Sequence", "normalizers": []},
    {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}] * 17},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff\xff\xff\x7f" + bytes(64)).decode()},
    {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode((1024).to_bytes(4, "little") + b"\xff" * 1024 + b"abc\0").decode(),
    },
    {"type": "Prepend", "prepend": "x" * 1000},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Split", "pattern": {"Regex": "(?:a|aa)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "CharDelimiterSplit", "delimiter": "a"},
    {"type": "FixedLength", "length": 0},
    {"type": "UnicodeScripts"},
    {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    {"type": "BertProcessing", "sep": ["<end>", 2], "cls": ["<start>", 1]},
    {"type": "BertProcessing", "sep": ["<end>", 2**31], "cls": ["<start>", -1]},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Nmt"},
    {"type": "NFKD"},
]
PROMPTS = st.one_of(
    st.sampled_from(
        ["a red heart", "", " ", "a" * 3000, "red " * 500, "\0", "😀", "a\u0301\u200d", "ΑΣ ΑΣ.", "ﷺ" * 400]
    ),
    st.text(max_size=40),
    TEXTS,
)


def damaged(draw: Draw) -> tuple[bytes, tuple[str, ...]]:
    """Damage one of the tokenizers."""
    content = draw(st.sampled_from(TOKENIZERS))
    start: tuple[str, ...] = ()
    if draw(st.integers(0, 2)) == 0:
        kind = draw(st.sampled_from(["normalizer", "pre_tokenizer", "post_processor", "decoder", "model"]))
        other = draw(st.one_of(st.sampled_from(_PARTS), st.sampled_from([t[kind] for t in TOKENIZERS])))
        content = {**content, kind: other}
        start = (f"{kind} => {json.dumps(other)[:80]}",)
        if draw(st.booleans()):
            return json.dumps(content).encode(), start
    data, edits = edited_json(draw, content, st.one_of(VALUES, st.sampled_from(_PARTS), st.sampled_from(_WORDS)))
    return data, (*start, *edits)
