"""Writing files whole or not at all, fingerprints of weights and texts, and errors as one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn  # Importing torch takes seconds, for which --help should not wait.


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`. Rename that file to `path` when it is complete and on the disk.

    If the block raises, the temporary file is deleted and `path` stays unchanged. A link is followed. The temporary
    name is random, so that files left by killed processes are never in the way. It is short even if the name is long.

    Yields:
        The temporary path. The block writes the file there.
    """
    path = path.resolve()
    if path.exists() and not path.stat().st_mode & stat.S_IWUSR:  # Respect the permission even as root.
        raise PermissionError(errno.EACCES, "the file is read-only, so it is not replaced", str(path))
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(file: IO[Any]) -> None:
    """Wait until everything written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def fingerprint(*modules: nn.Module) -> str:
    """Identify weights by 16 hex digits: a hash over the name, the shape and about 100 values of every tensor."""
    hashed = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            values = tensor.detach().flatten()
            values = values[:: values.numel() // 64 | 1]  # An odd stride does not stay in one column.
            hashed.update(f"{name} {list(tensor.shape)}".encode())
            hashed.update(values.double().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def digest(texts: Sequence[str]) -> str:
    """Identify texts and their order by 16 hex digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def is_file(path: Path) -> bool:
    """Whether there is a file of this name; False for a name that no system has."""
    try:
        return path.is_file()
    except OSError:  # Too long a name.
        return False


def is_directory(path: Path) -> bool:
    """Whether there is a directory of this name; False for a name that no system has."""
    try:
        return path.is_dir()
    except OSError:
        return False


class OneLineError(ValueError):
    """An error about a user's file. Its message is one line, even if it quotes strange names or values."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, 1000))


def one_line(error: BaseException | str, length: int = 300) -> str:
    """Put an error's message, or its type if there is none, on one line of at most `length` characters.

    Characters that a terminal cannot print, control codes among them, become escapes.
    """
    text = " ".join(str(error)[: 4 * length].split())
    if not text.isprintable():
        text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return shortened(text, length) or type(error).__name__


def shortened(text: str, length: int = 100) -> str:
    """Cut a text that is longer than `length` characters, and mark the cut by three dots."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."
