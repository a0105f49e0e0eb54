"""Captions to distil on: read one by one from text, JSON Lines and Parquet, kept on the disk, in a seeded order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FIELDS = ("prompt", "caption", "text", "Task2.Caption")  # where a record has its caption; the last is JourneyDB's


def load_prompts(path: Path, field: str | None = None) -> list[str]:
    """All of `read_prompts`, repetitions dropped."""
    return list(dict.fromkeys(read_prompts(path, field)))


def read_prompts(path: Path, field: str | None = None) -> Iterator[str]:
    """Read captions one by one, in order; blank ones are skipped, repetitions are not.

    Args:
        path: a .txt (one caption a line), a .jsonl (a record a line), a .parquet, or a directory of such files, which
            are read in the order of their names.
        field: where records have their caption, as in "Task2.Caption"; by default the first of FIELDS that a
            record has.

    Raises ValueError, naming file and line: no such file, another suffix, not UTF-8, a malformed record, no caption.
    """
    none = True
    for shard in _shards(path):
        try:
            for caption in _READERS[shard.suffix](shard, field):
                none = False
                yield caption
        except UnicodeDecodeError as error:
            raise ValueError(f"{shard}: not UTF-8 at byte {error.start}") from error
        except OSError as error:
            raise ValueError(f"{shard}: {error.strerror or error}") from error
    if none:
        raise ValueError(f"{path}: holds no prompt")


def _shards(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix not in _READERS:
            raise ValueError(f"{path}: prompts come from {', '.join(_READERS)} or a directory of such files")
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in _READERS)
    if not found:
        raise ValueError(f"{path}: holds no {', '.join(_READERS)}")
    return found


def _lines(path: Path, field: str | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from filter(None, map(str.strip, file))


def _json_lines(path: Path, field: str | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    caption = _caption(json.loads(line), field)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                if caption:
                    yield caption


def _parquet(path: Path, field: str | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = field if field is not None else next((name for name in FIELDS if name in names), None)
            if column not in names:
                raise ValueError(f"{path}: expected a column {field or ' or '.join(FIELDS)}, found {', '.join(names)}")
            for batch in file.iter_batches(columns=[column]):
                for number, caption in enumerate(batch.column(0).to_pylist()):
                    if caption is not None and not isinstance(caption, str):
                        raise ValueError(f"{path}: column {column} holds {type(caption).__name__} at row {number}")
                    if caption and caption.strip():
                        yield caption.strip()
    except ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from error


_READERS: dict[str, Callable[[Path, str | None], Iterator[str]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


def _caption(record: Any, field: str | None) -> str:
    names, blank = FIELDS if field is None else (field,), False
    for name in names:
        value = record
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            blank = True
            if value.strip():
                return value.strip()
    if blank:
        return ""
    raise ValueError(f"expected an object with {' or '.join(names)}, received {json.dumps(record)[:80]}")
