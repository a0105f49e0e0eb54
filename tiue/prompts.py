"""Captions for distillation, read one by one from text, JSON Lines and Parquet."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiue.files import one_line

# Fields of a record that may hold its caption. The last is JourneyDB's.
FIELDS = ("prompt", "caption", "text", "Task2.Caption")
LONGEST = 100_000  # characters of a caption; a longer one means that the file has another format
_LONGEST_LINE = 10_000_000  # characters of a line; records also have other fields

# Reasons for skipping a caption. The rest of its file is read.
BLANK, NULL, NOT_TEXT = "blank", "null", "not Unicode text (half of a surrogate pair)"
# Things in a directory that are skipped.
HIDDEN, FOLDERS, OTHER_FILES = "hidden files", "folders, whose files are not read", "files of other kinds"

_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_JUNK = {"__macosx", "thumbs.db", "desktop.ini"}  # files of operating systems, counted as hidden ones
_log = logging.getLogger(__name__)

Skipped = Counter[str]  # numbers of skipped captions and files, by reason
Reader = Callable[[Path, str | None, Skipped], Iterator[str]]


def load_prompts(path: Path, field: str | None = None) -> list[str]:
    """Read captions as `read_prompts` does, and drop repetitions."""
    return list(dict.fromkeys(read_prompts(path, field)))


def read_prompts(path: Path, field: str | None = None, skipped: Skipped | None = None) -> Iterator[str]:
    """Read captions one by one, in order. Repetitions are kept.

    Text is UTF-8, with or without a byte order mark, or UTF-16 with one. Suffixes may be in capitals. In a directory,
    hidden files (for example `._name.txt`), folders and files of other kinds are skipped. If a record has a key twice,
    the last one counts.

    Args:
        path: a .txt (one caption per line), a .jsonl (one record per line), a .parquet, or a directory of such files.
            The files of a directory are read in the order of their names.
        field: the field of records that holds the caption, for example "Task2.Caption". By default, the first of
            FIELDS that a record has.
        skipped: counts the skipped captions (blank, null, or with half a surrogate pair) and files, by reason. By
            default, a warning at the end counts all but the blank captions.

    Yields:
        The captions.

    Raises:
        ValueError: a file is missing or in another format or encoding. A record is malformed or has no caption. A
            caption has more than LONGEST characters, or no caption is left. The message names file and line.
    """
    counts: Skipped = Counter() if skipped is None else skipped
    none = True
    try:
        files = _files(path, counts)
    except OSError as error:
        raise ValueError(f"{one_line(str(path))}: {one_line(error.strerror or error)}") from error
    if field is not None and all(file.suffix.lower() == ".txt" for file in files):
        raise ValueError(f"{path}: a .txt has no fields, so it has no {one_line(field, 100)}")
    for file in files:
        try:
            for caption in _READERS[file.suffix.lower()](file, field, counts):
                none = False
                yield caption
        except OSError as error:
            raise ValueError(f"{file}: {one_line(error.strerror or error)}") from error
    if none:
        raise ValueError(f"{path}: holds no prompt{f' (skipped: {in_words(counts)})' if counts else ''}")
    if skipped is None and (said := in_words(Counter({r: n for r, n in counts.items() if r != BLANK}))):
        _log.warning("%s: skipped %s", path, said)


def in_words(skipped: Skipped) -> str:
    """List the reasons with their numbers, for example "2 null, 1 hidden files"; "" if nothing was skipped."""
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())


def _files(path: Path, skipped: Skipped) -> list[Path]:
    if not path.is_dir():
        if path.suffix.lower() not in _READERS:
            raise ValueError(f"{path}: prompts come from {', '.join(_READERS)} or a directory of such files")
        if path.exists() and not path.is_file():  # It would be waited for.
            raise ValueError(f"{path}: expected a regular file")
        return [path]
    found: list[Path] = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") or entry.name.lower() in _JUNK:
            skipped[HIDDEN] += 1
        elif entry.is_dir():
            skipped[FOLDERS] += 1
        elif entry.suffix.lower() in _READERS and (entry.is_file() or not entry.exists()):  # A lost link is an error.
            found.append(entry)
        else:
            skipped[OTHER_FILES] += 1
    if not found:
        raise ValueError(f"{path}: holds no {', '.join(_READERS)}")
    return found


def _lines(path: Path, field: str | None, skipped: Skipped) -> Iterator[str]:
    for number, line in _numbered_lines(path):
        caption = _cleaned(line, skipped)
        if caption:
            yield _of_sane_length(caption, f"{path}, line {number}")


def _json_lines(path: Path, field: str | None, skipped: Skipped) -> Iterator[str]:
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            caption = _caption(json.loads(line), field, skipped)
        except RecursionError as error:
            raise ValueError(f"{where}: the record is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"{where}: {one_line(error)}") from error
        if caption:
            yield _of_sane_length(caption, where)


def _parquet(path: Path, field: str | None, skipped: Skipped) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    row, column = 0, field
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column is None:
                column = next((name for name in FIELDS if name in names), None)
            if column not in names:
                wanted, found = one_line(field or " or ".join(FIELDS), 100), one_line(", ".join(names) or "none", 100)
                raise ValueError(f"{path}: expected a column {wanted}, found {found}")
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    if value is None:
                        skipped[NULL] += 1
                    elif not isinstance(value, str):
                        raise ValueError(
                            f"{path}: column {one_line(column, 100)} holds {type(value).__name__} at row {row}"
                        )
                    elif caption := _cleaned(value, skipped):
                        yield _of_sane_length(caption, f"{path}, row {row}")
                    row += 1
    except UnicodeDecodeError as error:
        text = "the name of a column" if column is None else f"column {one_line(column, 100)}"
        raise ValueError(f"{path}: {text} is not UTF-8 after row {row}") from error
    except ArrowException as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


_READERS: dict[str, Reader] = {".txt": _lines, ".jsonl": _json_lines, ".parquet": _parquet}


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read lines with their numbers, from 1 on. Raises ValueError, with the line, for text that cannot be decoded."""
    with path.open("rb") as file:
        head = file.read(4)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
    number = 0
    # Bytes that are not UTF-8 become half surrogate pairs, which UTF-8 never has. Their line is then known.
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    with path.open(encoding=encoding, errors=errors) as file:
        try:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), 1):
                if len(line) == _LONGEST_LINE and not line.endswith("\n"):
                    raise ValueError(f"{path}, line {number}: expected at most {_LONGEST_LINE:,} characters in a line")
                if any("\udc80" <= character <= "\udcff" for character in line):
                    raise ValueError(f"{path}, line {number}: expected UTF-8, got other bytes; convert the file")
                if "\0" in line:
                    raise ValueError(
                        f"{path}, line {number}: expected text, got a NUL character (UTF-16 needs a byte order mark)"
                    )
                yield number, line
        except UnicodeError as error:
            raise ValueError(f"{path}, line {number + 1}: expected UTF-16, got other bytes") from error


def _cleaned(text: str, skipped: Skipped) -> str:
    """Return a caption without blanks around it, or "" to skip it."""
    text = text.strip()
    if not text:
        skipped[BLANK] += 1
    elif not _is_unicode(text):
        skipped[NOT_TEXT] += 1
        return ""
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_sane_length(caption: str, where: str) -> str:
    if len(caption) > LONGEST:
        raise ValueError(f"{where}: expected a caption of at most {LONGEST:,} characters, got {len(caption):,}")
    return caption


def _caption(record: Any, field: str | None, skipped: Skipped) -> str:
    """Return the caption of a record, or "" to skip it. Raises ValueError if the record has no such field."""
    if record is None:
        skipped[NULL] += 1
        return ""
    names, empty = FIELDS if field is None else (field,), ""
    for name in names:
        found, value = _look_up(record, name)
        if found and isinstance(value, str) and value.strip():
            return _cleaned(value, skipped)
        if found and (value is None or isinstance(value, str)):
            empty = empty or (NULL if value is None else BLANK)
    if empty:
        skipped[empty] += 1
        return ""
    wanted = one_line(" or ".join(names) or "''", 100)
    raise ValueError(f"expected an object with {wanted}, received {json.dumps(record)[:80]}")


def _look_up(record: Any, name: str) -> tuple[bool, Any]:
    """Look up a name, for example "Task2.Caption". Returns whether it exists, and its value."""
    value = record
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return False, None
        value = value[key]
    return True, value
