"""Settings as fields of a dataclass. The default, help, range and choices of a setting stand in one place.

    @dataclass(frozen=True)
    class Settings:
        size: int = setting(64, "height and width", group="the picture", at_least=8)

        def __post_init__(self):
            check(self)  # raises ValueError: `size` must be a whole number of at least 8, got 4

A command line makes its flags with `add_flags` and reads them with `given`. In messages, libraries write the names of
settings in backquotes. The command line shows these messages by `with_flags`, which replaces the names by flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from tiue.files import shortened

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}


@dataclass(frozen=True)
class _Rule:
    """The metadata of a field; see `setting`."""

    help: str
    group: str | None
    at_least: float | None
    above: float | None
    at_most: float | None
    choices: tuple[str, ...]
    aliases: tuple[str, ...]
    metavar: str | None
    shown: str | None
    repeated: bool


def setting(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] = (),
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    shown: str | None = None,
    repeated: bool = False,
) -> Any:
    """Make a dataclass field that holds a setting.

    Its type is bool, int, float or str; or a tuple of these; or one of all these types or None.

    Args:
        default: the default value.
        help: the flag's help. The default is added to it.
        group: the heading in the help for this setting and the following ones, up to the next group. A subclass can
            return to a group of its base class.
        at_least, above, at_most: the range of a number, or of all numbers of a tuple. Numbers must always be finite.
        choices: the allowed values of a text, or of all texts of a tuple.
        aliases: shorter names. `kl` adds the flag `--kl`.
        metavar: the name of the value in the help.
        shown: the default in the help, for a default of None or an empty one.
        repeated: a tuple's flag takes one value, and is given once for each. Other tuples are separated by commas.

    Returns:
        The field, for the body of the dataclass.
    """
    rule = _Rule(help, group, at_least, above, at_most, tuple(choices), tuple(aliases), metavar, shown, repeated)
    return dataclasses.field(default=default, metadata={"rule": rule})


def check(settings: Any) -> None:
    """Check the settings of a dataclass: types, ranges and choices. A list becomes a tuple, since JSON has no tuples.

    Raises:
        ValueError: a setting is wrong. The message has its name in backquotes, the expected and the received value.
    """
    for name, kind, rule in _rules(type(settings)):
        value = getattr(settings, name)
        if kind.several and isinstance(value, list):
            value = tuple(value)
            object.__setattr__(settings, name, value)
        if value is None and kind.optional:
            continue
        values = value if kind.several and isinstance(value, tuple) else (value,)
        if kind.several != isinstance(value, tuple) or not all(_fits(one, kind.of, rule) for one in values):
            raise ValueError(f"`{name}` must be {_expected(kind, rule)}, got {shortened(repr(value))}")


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add a flag for every setting of a dataclass. A flag that is not given is None: see `given`."""
    group: argparse._ActionsContainer = parser
    groups: dict[str, argparse._ActionsContainer] = {}
    for name, kind, rule in _rules(settings):
        if rule.group is not None:
            if rule.group not in groups:
                groups[rule.group] = parser.add_argument_group(rule.group)
            group = groups[rule.group]
        default = _default(settings, name)
        shown = rule.shown or _as_text(default)
        options: dict[str, Any] = {"default": None, "help": f"{rule.help} (default {shown})".replace("%", "%%")}
        if kind.of is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif rule.repeated:
            options |= {"action": "append", "type": kind.of, "metavar": rule.metavar}
        else:
            options |= {"type": _parser(kind), "metavar": rule.metavar}
            if rule.choices and not kind.several:
                options["choices"] = rule.choices
            elif rule.metavar is None:
                one = "NAME" if kind.of is str else "N"
                options["metavar"] = f"{one}[,{one}]" if kind.several else one
        group.add_argument(_flag(name), *map(_flag, rule.aliases), dest=name, **options)


def given(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Return the settings whose flags were given: name of the field => value."""
    values = {name: getattr(arguments, name) for name, _, _ in _rules(settings)}
    return {name: value for name, value in values.items() if value is not None}


def with_flags(message: str, settings: type) -> str:
    """Replace the names of settings in backquotes by their flags. Other names in backquotes stay."""
    names = {name for name, _, _ in _rules(settings)}
    return re.sub(r"`(\w+)`", lambda found: _flag(found[1]) if found[1] in names else found[0], message)


@dataclass(frozen=True)
class _Kind:
    """The type of a setting: `of`, or a tuple of `of` if `several`, or also None if `optional`."""

    of: type
    several: bool = False
    optional: bool = False


def _rules(settings: type) -> Iterator[tuple[str, _Kind, _Rule]]:
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if (rule := _rule(field)) is not None:
            yield field.name, _kind(hints[field.name]), rule


def _rule(field: Field[Any]) -> _Rule | None:
    return field.metadata.get("rule")


def _kind(hint: Any) -> _Kind:
    if get_origin(hint) is tuple:
        return _Kind(get_args(hint)[0], several=True)
    if NoneType in get_args(hint):
        (of,) = (part for part in get_args(hint) if part is not NoneType)
        return dataclasses.replace(_kind(of), optional=True)
    return _Kind(hint)


def _default(settings: type, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(settings) if field.name == name)


def _fits(value: Any, kind: type, rule: _Rule) -> bool:
    if type(value) is not kind and (kind, type(value)) != (float, int):  # A bool is not accepted as an int.
        return False
    if kind in (int, float):
        return (
            abs(value) <= sys.float_info.max  # false for NaN; math.isfinite fails for whole numbers beyond
            and (rule.at_least is None or value >= rule.at_least)
            and (rule.above is None or value > rule.above)
            and (rule.at_most is None or value <= rule.at_most)
        )
    return not rule.choices or value in rule.choices


def _expected(kind: _Kind, rule: _Rule) -> str:
    if rule.choices:
        return f"{'some' if kind.several else 'one'} of {', '.join(rule.choices)}"
    limits = {"at least": rule.at_least, "above": rule.above, "at most": rule.at_most}
    bounds = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
    if bounds.startswith("at"):
        bounds = f"of {bounds}"
    noun = (_SEVERAL if kind.several else _KINDS)[kind.of]
    return f"{noun} {bounds}".rstrip() + (" or None" if kind.optional else "")


def _parser(kind: _Kind) -> Callable[[str], Any]:
    """Make the function that argparse calls with a flag's text. It raises ArgumentTypeError for a wrong text."""

    def parse(text: str) -> Any:
        try:
            return tuple(kind.of(part) for part in text.split(",")) if kind.several else kind.of(text)
        except ValueError as error:
            expected = f"{_SEVERAL[kind.of]} separated by commas" if kind.several else _KINDS[kind.of]
            raise argparse.ArgumentTypeError(f"expected {expected}, got {shortened(repr(text))}") from error

    return parse


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
