"""Flags for the options of the library, and back: what the user gave, as keyword arguments."""

import argparse
from typing import Any, NoReturn, TypeVar, cast

from tiue_runtime.errors import RequestError
from tiue_runtime.options import LESSONS, choices, described

T = TypeVar("T", bound=Any)


def bundle_flag(parser: argparse.ArgumentParser) -> None:
    """Add --bundle."""
    parser.add_argument(
        "--bundle",
        metavar="NAME_OR_PATH",
        help="a bundle's directory or installed name (default: TIUE_BUNDLE, else emoji)",
    )


def option_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Add a flag for every option of a TypedDict whose `flag` is set."""
    for name, (kind, option, _) in described(options).items():
        if not option.flag:
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


def lesson_flags(parser: argparse.ArgumentParser) -> None:
    """Add hidden flags, which refuse the arguments of diffusers with a sentence each."""
    for name in LESSONS:
        flags = dict.fromkeys(("--" + name.replace("_", "-"), f"--{name}"))
        parser.add_argument(*flags, dest=name, nargs="?", action=_Lesson, help=argparse.SUPPRESS)


def given(arguments: argparse.Namespace, options: type[T]) -> T:
    """Return the options that the user gave, as keyword arguments."""
    values = vars(arguments)
    named = {name: values[name] for name in described(options) if values.get(name) is not None}
    return cast(T, named)
