"""The check of tokenizer.json: only the parts that the exporter writes for CLIP, BERT, T5 and similar tokenizers.

The tokenizers library obeys the file without limits. A file can make it take all memory, run for hours, or end the
process. So every part is checked against tables of known parts before the library reads the file.
"""

import base64
import binascii
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiue_runtime.bundle.directory import read_limited
from tiue_runtime.bundle.fields import parse_json
from tiue_runtime.errors import BundleError, clip, shorten

Check = Callable[[Any], bool]

_LIMIT = 64 * 2**20  # bytes of the file
_MOST_TOKENS = 2_000_000
_MOST_PARTS = 16  # in a sequence
_LARGEST_ID = 2**31 - 1
_VALUE = 1 << 31  # the bit that marks a leaf's unit in a trie
_CONTINUATIONS = {bytes([byte]) for byte in range(0x80, 0xC0)}  # bytes of UTF-8 that begin no character
_CHARSMAP_LIMIT = 4 * 2**20  # characters in base64; T5's has 316,720

# Patterns of known tokenizers. Other patterns might take hours for some prompts.
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_IGNORED = r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'.:·’]"  # noqa: RUF001
_FINAL_SIGMA = rf"(?<={_CASED}|{_CASED}{_IGNORED}|{_CASED}{_IGNORED}{_IGNORED})Σ(?!{_IGNORED}*{_CASED})"
_REPLACEMENTS = (
    ({"Regex": r"\s+"}, " "),
    ({"Regex": "[\\s\u0345]+"}, " "),
    ({"Regex": r"[\p{Cn}\p{Cf}]"}, ""),
    ({"Regex": _FINAL_SIGMA}, "ς"),
    ({"Regex": " {2,}"}, "▁"),
    ({"Regex": " {2,}"}, " "),
    ({"String": " "}, "▁"),
    ({"String": "``"}, '"'),
    ({"String": "''"}, '"'),
)
_SPLITS = (
    {"Regex": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"},
    {"String": ""},
    {"String": " "},
)


def read_tokenizer(path: Path, length: int) -> str:
    """Read a tokenizer.json that pads and truncates to exactly `length` tokens.

    Returns:
        The text of the file, safe for the tokenizers library.

    Raises:
        BundleError: the file is not one that the exporter writes.
    """
    try:
        data = read_limited(path, _LIMIT)
        content = _object(parse_json(data), "tokenizer.json")
        _check_lengths(content, length)
        _check_parts(content, length)
    except BundleError as error:
        raise BundleError(f"{path}: not a tokenizer that can be used: {error}. Export the bundle again.") from error
    return data.decode()


def _check_lengths(content: dict[str, Any], length: int) -> None:
    padding: Any = content.get("padding")
    truncation: Any = content.get("truncation")
    strategy: Any = padding.get("strategy") if _is_object(padding) else None
    padded = strategy.get("Fixed") if _is_object(strategy) else None
    cut = truncation.get("max_length") if _is_object(truncation) else None
    if not (_is(length)(padded) and _is(length)(cut)):
        raise BundleError(
            f"expected padding and truncation to text_length {length}, "
            f"got padding to {shorten(padded)} and truncation to {shorten(cut)}"
        )
    _check_fields(padding, "padding", _PADDING)
    _check_fields(truncation, "truncation", _TRUNCATION)


def _check_parts(content: dict[str, Any], length: int) -> None:
    known = {"version", "truncation", "padding", "added_tokens", "model", *_KINDS}
    unknown = sorted(set(content) - known)
    if unknown:
        raise BundleError(f"expected no field {shorten(unknown[0])}")
    _require(_is("1.0"), content.get("version"), "version")
    ids = _model_ids(_object(content.get("model"), "model"))
    added: Any = content.get("added_tokens", [])
    _require(_list_of(10_000), added, "added_tokens")
    for i, token in enumerate(added):
        _check_fields(_object(token, f"added_tokens[{i}]"), f"added_tokens[{i}]", _ADDED)
        ids.add(token.get("id"))
    for kind, types in _KINDS.items():
        if content.get(kind) is not None:
            _check_part(content[kind], kind, types, 0)
    own = _own_ids(content.get("post_processor"))
    if len(own) > length:
        raise BundleError(f"post_processor: expected at most {length} tokens, got {len(own)}")
    for where, number in [("padding.pad_id", content["padding"].get("pad_id")), *(("post_processor", i) for i in own)]:
        if number not in ids:
            raise BundleError(f"{where}: expected an id of the vocabulary, got {shorten(number)}")


def _check_part(part: Any, where: str, types: Mapping[str, Mapping[str, Check]], depth: int) -> None:
    """Check a normalizer, pre-tokenizer, post-processor or decoder, or a sequence of them."""
    part = _object(part, where)
    kind = part.get("type")
    if kind == "Sequence" and depth == 0:
        (name,) = set(part) - {"type"} if len(part) == 2 else (None,)
        _require(_is(_SEQUENCES.get(where)), name, f"{where}: the list of a Sequence")
        _require(_list_of(_MOST_PARTS), part[name], f"{where}.{name}")
        for i, inner in enumerate(part[name]):
            _check_part(inner, f"{where}.{name}[{i}]", types, depth + 1)
        return
    if not isinstance(kind, str) or kind not in types:
        raise BundleError(f"{where}: expected one of {', '.join(types)}, got {shorten(kind)}")
    _check_fields({key: value for key, value in part.items() if key != "type"}, where, types[kind])
    if kind == "Replace" and (part.get("pattern"), part.get("content")) not in _REPLACEMENTS:
        raise BundleError(f"{where}: expected a known replacement, got {shorten(part)}")


def _check_fields(part: Mapping[str, Any], where: str, checks: Mapping[str, Check]) -> None:
    for key, value in part.items():
        if key not in checks:
            raise BundleError(f"{where}: expected no field {shorten(key)}")
        _require(checks[key], value, f"{where}.{key}")


def _model_ids(model: dict[str, Any]) -> set[Any]:
    """Check the model, and return the ids of its vocabulary."""
    kind = model.get("type")
    if not isinstance(kind, str) or kind not in _MODELS:
        raise BundleError(f"model: expected one of {', '.join(_MODELS)}, got {shorten(kind)}")
    _check_fields({key: value for key, value in model.items() if key != "type"}, "model", _MODELS[kind])
    vocabulary: Any = model.get("vocab")
    return set(vocabulary.values()) if _is_object(vocabulary) else set(range(len(vocabulary or ())))


def _own_ids(processor: Any) -> list[Any]:
    """Return the ids of the tokens that a checked post-processor adds."""
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        return [number for inner in processor["processors"] for number in _own_ids(inner)]
    if processor["type"] == "TemplateProcessing":
        named = {name: token["ids"] for name, token in processor.get("special_tokens", {}).items()}
        pieces = (piece["SpecialToken"]["id"] for piece in processor.get("single", []) if "SpecialToken" in piece)
        return [number for name in pieces for number in named.get(name, [None])]
    return [processor[key][1] for key in ("cls", "sep") if key in processor]


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not _is_object(value):
        raise BundleError(f"{where}: expected an object, got {shorten(value)}")
    return value


def _require(check: Check, value: Any, where: str) -> None:
    if not check(value):
        raise BundleError(f"{clip(where)}: got {shorten(value)}, which the exporter does not write")


def _is(*allowed: Any) -> Check:
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def _up_to(most: int) -> Check:
    return lambda value: type(value) is int and 0 <= value <= most


def _list_of(most: int, item: Check = lambda _: True) -> Check:
    return lambda value: _is_list(value) and len(value) <= most and all(map(item, value))


def _pair(first: Check, second: Check) -> Check:
    return lambda value: _is_list(value) and len(value) == 2 and first(value[0]) and second(value[1])


def _exactly(checks: Mapping[str, Check]) -> Check:
    """Check an object that has these fields and no others."""
    return lambda value: (
        _is_object(value) and set(value) == set(checks) and all(check(value[key]) for key, check in checks.items())
    )


def _word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000


def _word_or_null(value: Any) -> bool:
    return value is None or _word(value)


_id = _up_to(_LARGEST_ID)


def _score(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6


def _ids(value: Any) -> bool:
    """Say whether a value maps tokens to ids. A vocabulary has 30,000 or more, so its ids are checked together."""
    if not _is_object(value) or len(value) > _MOST_TOKENS or set(map(type, value.values())) - {int}:
        return False
    return not value or (min(value.values()) >= 0 and max(value.values()) <= _LARGEST_ID)


def _template(*texts: str) -> Check:
    """Check a list of {"SpecialToken" or "Sequence": {"id": ..., "type_id": ...}}. A prompt is the text A."""
    ids = {"SpecialToken": _word, "Sequence": _is(*texts)}
    pieces = [_exactly({kind: _exactly({"id": check, "type_id": _is(0, 1)})}) for kind, check in ids.items()]
    return _list_of(_MOST_PARTS, lambda value: any(piece(value) for piece in pieces))


def _special_tokens(value: Any) -> bool:
    token = _exactly({"id": _word, "ids": _list_of(_MOST_PARTS, _id), "tokens": _list_of(_MOST_PARTS, _word)})
    return (
        _is_object(value)
        and len(value) <= _MOST_PARTS
        and all(token(one) and len(one["ids"]) == len(one["tokens"]) for one in value.values())
    )


def _charsmap(value: Any) -> bool:
    """Say whether text is a well-formed character table of SentencePiece: a size, a trie of that size, its values."""
    if not isinstance(value, str) or len(value) > _CHARSMAP_LIMIT:
        return False
    try:
        data = base64.b64decode(value, validate=True)
        size = int.from_bytes(data[:4], "little")
        texts = data[4 + size :]
        texts.decode("utf-8")
    except (binascii.Error, ValueError):
        return False
    return size >= 1024 and size % 1024 == 0 and len(data) >= 4 + size and _is_trie(data[4 : 4 + size], texts)


def _is_trie(data: bytes, texts: bytes) -> bool:
    """Say whether every search in a trie (a double array of Darts) stays inside it and ends where a text begins.

    The tokenizers library does not check this: it panics and prints a report. A unit has 32 bits: an offset, the flag
    of a leaf, and the byte that leads to the unit. A leaf's unit holds a place in `texts`. Blocks of 256 units are
    whole, so that the next byte never leads out of one.
    """
    units = struct.unpack(f"<{len(data) // 4}I", data)
    for i, unit in enumerate(units):
        if i > 0 and (unit & _VALUE or not unit & 0xFF):
            continue  # No byte leads here.
        target = i ^ ((unit >> 10) << ((unit & 1 << 9) >> 6))
        if target >= len(units):
            return False
        if i > 0 and unit & 1 << 8:
            place = units[target] & ~_VALUE
            if place > len(texts) or texts[place : place + 1] in _CONTINUATIONS:
                return False
    return True


_FLAG, _NULL = _is(True, False), _is(None)
_DIRECTION = _is("Left", "Right")
_BYTE_LEVEL: dict[str, Check] = {"add_prefix_space": _FLAG, "trim_offsets": _FLAG, "use_regex": _FLAG}
_METASPACE: dict[str, Check] = {
    "replacement": _is("▁"),
    "prepend_scheme": _is("always", "first", "never"),
    "split": _is(True),
}
_PADDING: dict[str, Check] = {
    "strategy": lambda value: _is_object(value) and set(value) == {"Fixed"},
    "direction": _DIRECTION,
    "pad_to_multiple_of": _NULL,
    "pad_id": _id,
    "pad_type_id": _is(0, 1),
    "pad_token": _word,
}
_TRUNCATION: dict[str, Check] = {
    "direction": _DIRECTION,
    "max_length": _id,
    "strategy": _is("LongestFirst"),
    "stride": _is(0),
}
_ADDED: dict[str, Check] = {
    "id": _id,
    "content": lambda value: _word(value) and value != "",
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), _FLAG),
}
_SEQUENCES = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
_KINDS: dict[str, dict[str, dict[str, Check]]] = {
    "normalizer": {
        "BertNormalizer": {
            "clean_text": _FLAG,
            "handle_chinese_chars": _FLAG,
            "strip_accents": _is(True, False, None),
            "lowercase": _FLAG,
        },
        **{kind: {} for kind in ("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "StripAccents")},
        "Strip": {"strip_left": _FLAG, "strip_right": _FLAG},
        "Replace": {"pattern": lambda _: True, "content": _word},  # checked as a pair
        "Precompiled": {"precompiled_charsmap": _charsmap},
    },
    "pre_tokenizer": {
        **{kind: {} for kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")},
        "ByteLevel": _BYTE_LEVEL,
        "Metaspace": _METASPACE,
        "Punctuation": {"behavior": _is("Isolated", "Removed", "Contiguous")},
        "Digits": {"individual_digits": _FLAG},
        "Split": {
            "pattern": lambda value: value in _SPLITS,
            "behavior": _is("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"),
            "invert": _FLAG,
        },
    },
    "post_processor": {
        "BertProcessing": {"sep": _pair(_word, _id), "cls": _pair(_word, _id)},
        "RobertaProcessing": {
            "sep": _pair(_word, _id),
            "cls": _pair(_word, _id),
            "trim_offsets": _FLAG,
            "add_prefix_space": _FLAG,
        },
        "ByteLevel": _BYTE_LEVEL,
        "TemplateProcessing": {
            "single": _template("A"),
            "pair": _template("A", "B"),
            "special_tokens": _special_tokens,
        },
    },
    "decoder": {
        "ByteLevel": _BYTE_LEVEL,
        "WordPiece": {"prefix": _word, "cleanup": _FLAG},
        "Metaspace": _METASPACE,
        "BPEDecoder": {"suffix": _word},
    },
}
_MODELS: dict[str, dict[str, Check]] = {
    "WordLevel": {"vocab": _ids, "unk_token": _word},
    "WordPiece": {
        "vocab": _ids,
        "unk_token": _word,
        "continuing_subword_prefix": _word,
        "max_input_chars_per_word": _up_to(1000),
    },
    "BPE": {
        "vocab": _ids,
        "merges": _list_of(_MOST_TOKENS, lambda value: _word(value) or _pair(_word, _word)(value)),
        "dropout": _NULL,  # Dropout would give a prompt other tokens each time.
        **dict.fromkeys(("unk_token", "continuing_subword_prefix", "end_of_word_suffix"), _word_or_null),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), _FLAG),
    },
    "Unigram": {
        "vocab": _list_of(_MOST_TOKENS, _pair(_word, _score)),
        "unk_id": lambda value: value is None or _id(value),
        "byte_fallback": _FLAG,
    },
}
