"""Captions to distil on: read one by one from text, JSON Lines and Parquet, kept on the disk, in a seeded order."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIELDS = ("prompt", "caption", "text", "Task2.Caption")  # where a record has its caption; the last is JourneyDB's
_DIGEST_BYTES = 16


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


class Prompts(Sequence[str]):
    """Unique captions in a file, of which only those that are asked for are read. Made by `store_prompts`."""

    def __init__(self, directory: Path):
        self._ends = np.load(directory / "ends.npy", mmap_mode="r")
        text = directory / "text.bin"
        self._text = np.memmap(text, np.uint8, "r") if text.stat().st_size else np.empty(0, np.uint8)
        self.digest = (directory / "digest").read_text()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)} prompts")
        index %= len(self)
        begin = int(self._ends[index - 1]) if index else 0
        return bytes(self._text[begin : int(self._ends[index])]).decode()


def store_prompts(captions: Iterable[str], directory: Path) -> int:
    """Write captions for `Prompts`, each once, in the order of their first appearance.

    Memory holds some 100 bytes per caption, to know repetitions by. Returns how many of those there were.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "digest").unlink(missing_ok=True)  # what is half written cannot be opened
    ends, seen, total = array("q"), set[bytes](), 0
    whole = hashlib.sha256()
    with (directory / "text.bin").open("wb") as file:
        end = 0
        for caption in captions:
            total += 1
            encoded = caption.encode()
            known = hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).digest()
            if known not in seen:
                seen.add(known)
                end += file.write(encoded)
                ends.append(end)
                whole.update(len(encoded).to_bytes(8, "little") + encoded)
    np.save(directory / "ends.npy", np.array(ends, np.int64))
    (directory / "digest").write_text(whole.hexdigest()[:16])
    return total - len(ends)


class PromptOrder:
    """An endless seeded order of 0..count-1: each epoch is a new permutation, known without those before it."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self._count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._count, generator=generator)
        return int(self._order[index])


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
