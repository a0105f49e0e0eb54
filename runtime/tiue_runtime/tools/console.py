"""What the command line prints: lines on stdout, and errors and warnings with the names of flags on stderr."""

import errno
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import IO

from tiue_runtime.options import LoadOptions, RequestOptions, described
from tiue_runtime.tools.serve_command import NAMES


def say(kind: str, message: object, *, flags: bool = True) -> None:
    """Print an error or a warning as one line on stderr, with flags in place of the names of options."""
    line = " ".join(str(message).split())
    write(f"tiue-runtime: {kind}: {with_flags(line) if flags else line}", "stderr")


def write(text: str, stream: str = "stdout", end: str = "\n") -> None:
    """Print to stdout or stderr. If its reader (for example head) has gone, the command continues silently."""
    output: IO[str] | None = getattr(sys, stream)
    if output is None:  # Programs without a console have none.
        return
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    try:
        with tqdm.external_write_mode(output) if tqdm else nullcontext():  # A progress bar makes room.
            print(text, file=output, end=end, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno != errno.EINVAL:  # EINVAL: a closed pipe on Windows
            raise
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, output.fileno())
        os.close(nothing)


def print_rows(rows: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    column = max(map(len, rows)) + 2
    for key, value in rows.items():
        write(f"{key:<{column}}{value}")


def with_flags(message: str) -> str:
    """Replace the names of options in a message of the library by the flags of the command line."""
    message = re.sub(rf"^{_NAME}(, {_NAME})*(?=:)", lambda found: re.sub(_NAME, _flag, found[0]), message)
    message = re.sub(rf"\b{_NAME}=\"([^\"]+)\"", lambda found: f"{_flag(found)} {found[2]}", message)
    return re.sub(f"`{_NAME}`", _flag, message)


def _flag(found: re.Match[str]) -> str:
    return "--" + found[1].replace("_", "-")


def _names() -> Iterator[str]:
    """List the options that have flags."""
    yield from ("bundle", "cuda_graphs", "out", "runs", "name", "offline", "allow_http", "key", "certificates")
    yield from NAMES
    yield from ("private_key", "grid", "prompts", "shards")
    for options in (RequestOptions, LoadOptions):
        yield from (name for name, (_, option, _) in described(options).items() if option.flag)


_NAME = f"({'|'.join(_names())})"
