"""Damaged files of captions: .txt, .jsonl and .parquet."""

import io
from functools import cache
from typing import Any

from hypothesis import strategies as st

from fuzz.cases import RAW, TEXTS, VALUES, Case, Draw, dump, edit_bytes, edit_json, encode

_LINES = st.one_of(
    TEXTS, st.text(max_size=30), st.sampled_from(["a red heart", "日本", "\u2028", "\x0b", "\r", "x" * 200_000])
)
_RECORDS: list[Any] = [
    {"prompt": "a red heart"},
    {"caption": "a star", "id": 1},
    {"Task2": {"Caption": "the sea"}},
    {"text": None},
]


@st.composite
def caption_files(draw: Draw) -> Case:
    """A file, or a folder of files, of captions."""
    count = draw(st.sampled_from([1, 1, 1, 2]))
    files: dict[str, bytes] = {}
    edits: list[str] = []
    for number in range(count):
        suffix = draw(st.sampled_from([".txt", ".jsonl", ".jsonl", ".parquet", ".TXT", ".JSONL"]))
        data, said = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}[suffix.lower()](draw)
        start = draw(st.sampled_from(["", "", "", "._", "."])) if count > 1 else ""
        files[f"{start}captions{number}{suffix}"] = data
        edits.append(f"{suffix}: {said}")
    field = draw(st.sampled_from([None, None, None, "prompt", "Task2.Caption", "", "a.b.c", "\0", "x" * 1000]))
    return Case(files, tuple(edits), {"field": field})


def _text(draw: Draw) -> tuple[bytes, str]:
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "\0", "\x85"]))
    data, how = encode(draw, end.join(draw(st.lists(_LINES, max_size=5))))
    return _maybe_bytes(draw, data, how)


def _json_lines(draw: Draw) -> tuple[bytes, str]:
    lines: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        record = draw(
            st.one_of(st.sampled_from(_RECORDS), st.builds(lambda text: {"prompt": text}, _LINES), VALUES, RAW)
        )
        if isinstance(record, dict) and draw(st.booleans()):
            record, _ = edit_json(draw, record)
        lines.append(dump(record))
    data, how = encode(draw, "\n".join(lines))
    return _maybe_bytes(draw, data, how)


def _parquet(draw: Draw) -> tuple[bytes, str]:
    kind = draw(st.sampled_from(sorted(_tables())))
    return _maybe_bytes(draw, _tables()[kind], kind, often=True)


@cache
def _tables() -> dict[str, bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {
        "prompts": {"prompt": ["a red heart", None, "the sea", ""]},
        "numbers": {"prompt": [1, 2]},
        "bytes": {"prompt": [b"a", b"\xff"]},
        "lists": {"prompt": [["a"], ["b"]]},
        "structs": {"Task2": [{"Caption": "a"}]},
        "other": {"x": ["a"]},
        "none": {"prompt": pa.array([], pa.string())},
        "long": {"prompt": ["x" * 200_000]},
        "nulls": {"prompt": pa.nulls(3)},
        "dictionary": {"prompt": pa.array(["a", "b", "a"]).dictionary_encode()},
        "large": {"prompt": pa.array(["a"], pa.large_string())},
        "named": {"x" * 3000: ["a"]},
    }
    found: dict[str, bytes] = {}
    for name, column in columns.items():
        for compression in ("none", "snappy"):
            stream = io.BytesIO()
            parquet.write_table(pa.table(column), stream, compression=compression)
            found[f"{name}, {compression}"] = stream.getvalue()
    return found


def _maybe_bytes(draw: Draw, data: bytes, said: str, often: bool = False) -> tuple[bytes, str]:
    for _ in range(draw(st.integers(0, 3)) if often else draw(st.sampled_from([0, 0, 0, 1, 2]))):
        data, edit = edit_bytes(draw, data)
        said = f"{said}, {edit}"
    return data, said
