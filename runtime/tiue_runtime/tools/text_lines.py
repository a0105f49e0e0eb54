"""Lines of text from a file or stdin, each checked for size and encoding."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

from tiue_runtime.errors import RequestError, clip, reason, shorten

STDIN = "-"
LONGEST_LINE = 2**20  # bytes
MOST_LINES = 2**20

_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def shown(source: str) -> str:
    """Return the name of a source for a message."""
    return "stdin" if source == STDIN else clip(source, 300)


def read_lines(source: str, name: str) -> Iterator[tuple[int, bytes]]:
    """Read the lines of a file, or of stdin ("-"), that are not blank, with their numbers, from 1. Pipes may be given.

    Messages name the argument `name`. Raises RequestError if the source cannot be read, or is too long.
    """
    try:
        with _opened(source, name) as file:
            for number in range(1, MOST_LINES + 1):
                line = file.readline(LONGEST_LINE + 1)
                if not line:
                    return
                if number == 1:
                    if line.startswith(_UTF_16):
                        raise RequestError(f"{name}: expected {shown(source)} in UTF-8, got UTF-16")
                    line = line.removeprefix(_BOM)
                if len(line) > LONGEST_LINE:
                    raise RequestError(
                        f"{name}: expected lines of at most {LONGEST_LINE:,} bytes, but line {number} of "
                        f"{shown(source)} is longer"
                    )
                if line.strip():
                    yield number, line.strip()
            if file.readline(1):
                raise RequestError(f"{name}: expected at most {MOST_LINES:,} lines, but {shown(source)} has more")
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        raise RequestError(f"{name}: cannot read {shown(source)}: {reason(error)}") from error


def _opened(source: str, name: str) -> AbstractContextManager[IO[bytes]]:
    if source != STDIN:
        return Path(source).open("rb")
    if sys.stdin is None:
        raise RequestError(f"{name}: expected prompts on stdin, but this process has none")
    return nullcontext(sys.stdin.buffer)


def read_prompts(source: str) -> list[str]:
    """Read prompts, one a line. Raises RequestError as `read_lines`, also if there is none or a line is not UTF-8."""
    prompts: list[str] = []
    for number, line in read_lines(source, "prompts"):
        try:
            prompts.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(
                f"prompts: expected UTF-8, but line {number} of {shown(source)} is {shorten(line)}"
            ) from error
    if not prompts:
        raise RequestError(f"prompts: expected one prompt a line, but {shown(source)} has none")
    return prompts
