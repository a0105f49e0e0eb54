"""The command `generate`: pictures of a prompt, or of a saved picture's record, in files."""

import argparse
import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from tiue_runtime.errors import RequestError
from tiue_runtime.options import LoadOptions, RequestOptions

_CHECKED_FILES = 1000  # pictures whose file names are checked first; more are hardly ever made at once
_LONGEST_NAME = 60  # characters of a prompt in a file name

Write = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that are not options of the library."""
    parser.add_argument("prompt", nargs="*", help="a description of the picture, for example: a red heart")
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="file to save, .png, .jpg or .webp; with several pictures, FILE-1.png, FILE-2.png, ... (default: a new "
        "file named after the prompt and the seed)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PICTURE",
        help="make a saved picture again, with the bundle given here or the one that made it",
    )
    parser.add_argument(
        "--metadata", action=argparse.BooleanOptionalAction, default=True, help="save how the picture was made"
    )
    parser.add_argument(
        "--ai-mark", action=argparse.BooleanOptionalAction, default=True, help='mark the file as "made by AI"'
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object per picture, for programs")


def generate(arguments: argparse.Namespace, loading: LoadOptions, request: RequestOptions, write: Write) -> int:
    """Run the command. Raises RequestError, and errors of the pipeline."""
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.repeating import load_for
    from tiue_runtime.request import LARGEST
    from tiue_runtime.saving import check_picture_path, numbered, read_record

    prompt = " ".join(arguments.prompt)
    if bool(arguments.prompt) == bool(arguments.source):
        both = "both" if arguments.source else "neither"
        raise RequestError(f"prompt: expected either a description of the picture or --from PICTURE, got {both}")
    if arguments.source and request:
        raise RequestError(f"{next(iter(request))}: with --from, the record of the picture decides this")
    out = Path(arguments.out) if arguments.out is not None else None
    count = min(request.get("num_images", 1) or 1, LARGEST)  # More are refused by the pipeline.
    for path in islice(numbered(out or Path(".png-is-writable.png"), count), _CHECKED_FILES if out else 1):
        check_picture_path(path)
    if arguments.source:
        with load_for(read_record(arguments.source), arguments.bundle, **loading) as pipeline:
            result = pipeline.repeat(arguments.source)
    else:
        with Pipeline.load(arguments.bundle, memory=request.get("memory") or "auto", **loading) as pipeline:
            result = pipeline(prompt, **request)
    if out is None:
        name = prompt or Path(arguments.source).stem
        out = _new_name(name, result.seeds[0], len(result.images))
    paths = result.save(out, metadata=arguments.metadata, ai_mark=arguments.ai_mark)
    for path, image, seed in zip(paths, result.images, result.seeds, strict=True):
        size = f"{image.width}x{image.height}"
        row: dict[str, Any] = {"path": str(path), "width": image.width, "height": image.height, "seed": seed}
        write(json.dumps({**row, "prompt": prompt or None}) if arguments.json else f"{path}  {size}  seed {seed}")
    if not arguments.json:
        computed = f" in {result.precision}" if result.precision else ""
        write(f"{result.timings['total']:.2f} s on {result.device}{computed}, without loading")
    return 0


def _new_name(prompt: str, seed: int, count: int) -> Path:
    """Return a file name that no file has: a-red-heart-1.png, or a-red-heart-1-again-2.png if that exists."""
    from tiue_runtime.saving import numbered

    words = re.sub(r"[\W_]+", "-", prompt.lower())[:_LONGEST_NAME].strip("-") or "picture"
    while len(words.encode()) > 4 * _LONGEST_NAME // 2:  # File systems count bytes.
        words = words[:-1]
    again = 1
    while True:
        path = Path(f"{words}-{seed}{f'-again-{again}' if again > 1 else ''}.png")
        if not any(one.exists() for one in numbered(path, count)):
            return path
        again += 1
