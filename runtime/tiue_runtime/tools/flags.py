"""What commands share: how they are added, flags for options of the library, and for what a saved file holds."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast, get_args

from tiue_runtime.choices import Algorithm
from tiue_runtime.errors import RequestError
from tiue_runtime.options import LESSONS, LoadOptions, RequestOptions, choices, described

if TYPE_CHECKING:
    from PIL.Image import Image

    from tiue_runtime.credentials import Credentials

T = TypeVar("T", bound=Any)
Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
"""Adds a command: its name, its function and one line of help."""

Save = Callable[["Image", Path, bool], None]
"""Writes a picture to a path; the last argument says whether a file that exists is replaced."""


def bundle_flag(parser: argparse.ArgumentParser, dest: str = "bundle") -> None:
    """Add --bundle."""
    parser.add_argument(
        "--bundle",
        dest=dest,
        metavar="NAME_OR_PATH",
        help="a bundle's directory or installed name (default: TIUE_BUNDLE, else emoji)",
    )


def drawing_flags(parser: argparse.ArgumentParser, json: str) -> None:
    """Add what commands that save pictures have in common. json: the help of --json."""
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-q", "--quiet", action="store_true", help="print warnings and errors only")
    output.add_argument("--json", action="store_true", help=json)
    bundle_flag(parser)
    option_flags(parser, RequestOptions)
    option_flags(parser, LoadOptions)
    _saving_flags(parser)
    _lesson_flags(parser)


def option_flags(parser: argparse.ArgumentParser, options: type, only: tuple[str, ...] = ()) -> None:
    """Add a flag for every option of a TypedDict whose `flag` is set, or only for some of them."""
    for name, (kind, option, _) in described(options).items():
        if not option.flag or (only and name not in only):
            continue
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=option.help)
            continue
        listed = choices(kind, option) or None
        parse = {int: int, float: float}.get(kind, str)
        metavar = option.metavar if option.metavar or listed else None
        parser.add_argument(flag, type=parse, choices=listed, metavar=metavar, help=option.help)


class _Lesson(argparse.Action):
    """A flag that people from diffusers may try. It ends in one sentence that teaches."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        raise RequestError(f"{self.option_strings[0]}: {LESSONS[self.dest]}")


def _lesson_flags(parser: argparse.ArgumentParser) -> None:
    """Add hidden flags, which refuse the arguments of diffusers with a sentence each."""
    for name in LESSONS:
        flags = dict.fromkeys(("--" + name.replace("_", "-"), f"--{name}"))
        parser.add_argument(*flags, dest=name, nargs="?", action=_Lesson, help=argparse.SUPPRESS)


def given(arguments: argparse.Namespace, options: type[T]) -> T:
    """Return the options that the user gave, as keyword arguments."""
    values = vars(arguments)
    named = {name: values[name] for name in described(options) if values.get(name) is not None}
    return cast(T, named)


def _saving_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about the record, the mark of AI, and content credentials."""
    parser.add_argument(
        "--metadata", action=argparse.BooleanOptionalAction, default=True, help="save how the picture was made"
    )
    parser.add_argument(
        "--ai-mark", action=argparse.BooleanOptionalAction, default=True, help='mark the file as "made by AI"'
    )
    parser.add_argument(
        "--certificates",
        metavar="PEM",
        help="sign files with content credentials (C2PA): your certificate, then its chain; needs c2pa-python",
    )
    parser.add_argument("--private-key", metavar="PEM", help="the key of the first certificate, without a password")
    parser.add_argument(
        "--key-algorithm",
        choices=get_args(Algorithm),
        default="es256",
        help="of --private-key (default: es256, for keys on the curve P-256)",
    )


def saver(arguments: argparse.Namespace) -> Save:
    """Return the function that saves pictures as those flags say. Raises RequestError as `Credentials` does."""
    return partial(_save, arguments.metadata, arguments.ai_mark, _credentials(arguments))


def _save(
    metadata: bool, ai_mark: bool, credentials: "Credentials | None", image: "Image", path: Path, overwrite: bool
) -> None:
    from tiue_runtime.saving import save_picture

    save_picture(image, path, metadata=metadata, ai_mark=ai_mark, credentials=credentials, overwrite=overwrite)


def _credentials(arguments: argparse.Namespace) -> "Credentials | None":
    """Read the certificates and the key, and sign a small picture before a large one is drawn."""
    certificates, key = arguments.certificates, arguments.private_key
    if certificates is None and key is None:
        return None
    if certificates is None or key is None:
        missing = "certificates" if certificates is None else "private_key"
        raise RequestError(f"{missing}: content credentials need both --certificates and --private-key")
    from tiue_runtime.credentials import Credentials

    credentials = Credentials.load(certificates, key, arguments.key_algorithm)
    credentials.check()
    return credentials
