"""Typed reading of JSON. The annotations of a dataclass define its fields, and every error names the field.

`reader_of(hint)` makes a reader from a type. The JSON schema of bundle.json is made from the same annotations.
Types are str, bool, int, float, tuples, mappings and dataclasses, each also as Annotated[type, Field(...)].
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, NoReturn, cast, get_args, get_origin, get_type_hints

from tiue_runtime.errors import BundleError, clip, shorten

Reader = Callable[[object, str], Any]
"""Takes (value, path of the field). Returns the value, or raises BundleError."""

TEXT_PATTERN = "^[^\\u0000-\\u001f\\u007f]*$"  # No control characters, which could command a terminal.
STEPS_PATTERN = "^[1-9][0-9]{0,3}$"  # step counts as keys
_DIGITS = 20  # most digits of an integer, as many as 2**64 has
_ANY_DIGIT = bytes.maketrans(b"123456789", b"000000000")


@dataclass(frozen=True)
class Field:
    """The limits of a value. Lengths count the characters of strings, and the items of lists and objects."""

    doc: str = ""
    least: float | None = None
    most: float | None = None
    shortest: int = 0
    longest: int = 10_000
    choices: tuple[str, ...] = ()
    pattern: str = ""
    always: bool = False  # whether JSON must have it although the dataclass has a default


def unwrap(hint: Any) -> tuple[Any, Field]:
    """Split Annotated[type, Field] and `type | None` into (type, Field)."""
    note = Field()
    if get_origin(hint) is Annotated:
        hint, *_, note = get_args(hint)  # The outer one of nested annotations is the last.
    if get_origin(hint) is UnionType:
        hint = next(part for part in get_args(hint) if part is not type(None))
    return hint, note


def fields_of(cls: type) -> dict[str, tuple[Any, bool]]:
    """Return name => (annotation, whether JSON must have it) of a dataclass, in order."""
    hints = get_type_hints(cls, include_extras=True)
    given: dict[str, tuple[Any, bool]] = {}
    for item in dataclasses.fields(cls):
        default = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        given[item.name] = hints[item.name], not default or unwrap(hints[item.name])[1].always
    return given


def reader_of(hint: Any) -> Reader:
    """Make the reader of a type."""
    kind, note = unwrap(hint)
    if dataclasses.is_dataclass(kind):
        return _object(cast(type, kind))
    if get_origin(kind) is tuple:
        return _list(get_args(kind), note)
    if isinstance(get_origin(kind), type) and issubclass(cast(type, get_origin(kind)), Mapping):
        return _map(get_args(kind), note)
    return _string(note) if kind is str else _plain(kind, note)


def parse_json(data: bytes) -> object:
    """Parse strict JSON in UTF-8.

    Raises:
        BundleError: the data have a byte order mark, a duplicate key, NaN, infinity or an overlong number, or are not
            JSON.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise BundleError("expected JSON without a byte order mark")
    try:
        return json.loads(
            data.decode("utf-8"),
            # A vocabulary has 30,000 integers. They need no check if no digits of any kind stand that close together.
            parse_int=_parse_int if b"0" * _DIGITS in data.translate(_ANY_DIGIT) else None,
            parse_float=_parse_float,
            parse_constant=_refuse_number,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as error:
        raise BundleError(f"expected UTF-8, but {clip(str(error))}") from error
    except RecursionError as error:
        raise BundleError("expected JSON of a few levels, but it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BundleError(f"expected JSON, but {clip(str(error))}") from error


def require(condition: bool, where: str, expected: str, received: object) -> None:
    """Raise a BundleError that names the field, unless the condition holds."""
    if not condition:
        raise BundleError(f"{clip(where)}: expected {expected}, got {shorten(received)}")


def _parse_int(text: str) -> int:
    return int(text) if len(text) <= _DIGITS else _refuse_number(text)


def _parse_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise BundleError(f"expected finite numbers of at most {_DIGITS} digits, got {clip(text)}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise BundleError(f"expected every key once, got {shorten(twice)} twice")
    return content


def _wrong(where: str, expected: str, value: object) -> BundleError:
    kind = "null" if value is None else type(value).__name__
    return BundleError(f"{clip(where)}: expected {expected}, got {shorten(value)} ({kind})")


def _string(note: Field) -> Reader:
    def read(value: object, where: str) -> str:
        if not isinstance(value, str):
            raise _wrong(where, "a string", value)
        if note.choices:
            require(value in note.choices, where, f"one of {', '.join(note.choices)}", value)
        _check_length(value, note, where, "characters")
        readable = re.fullmatch(note.pattern or TEXT_PATTERN, value) and not re.search("[\ud800-\udfff]", value)
        require(bool(readable), where, "printable characters" if not note.pattern else note.pattern, value)
        return value

    return read


_PLAIN: dict[Any, tuple[str, set[type]]] = {
    bool: ("true or false", {bool}),
    int: ("an integer", {int}),
    float: ("a number", {int, float}),
}


def _plain(kind: Any, note: Field) -> Reader:
    expected, types = _PLAIN[kind]

    def read(value: Any, where: str) -> Any:
        if type(value) not in types:
            raise _wrong(where, expected, value)
        _check_range(value, note, where)
        return kind(value)

    return read


def _list(items: tuple[Any, ...], note: Field) -> Reader:
    """Make a reader of tuple[X, ...] or of a tuple of fixed length."""
    item = reader_of(items[0])
    if items[-1] is not ...:
        note = dataclasses.replace(note, shortest=len(items), longest=len(items))

    def read(value: object, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        values = cast(list[object], value)
        _check_length(values, note, where, "items")
        return tuple(item(v, f"{where}[{i}]") for i, v in enumerate(values))

    return read


def _map(types: tuple[Any, ...], note: Field) -> Reader:
    """Make a reader of Mapping[str, X] or Mapping[int, X]. In JSON, integer keys are decimal strings."""
    key_kind, item = types[0], reader_of(types[1])

    def read(value: object, where: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        values = cast(dict[str, object], value)
        _check_length(values, note, where, "entries")
        for key in values:
            if key_kind is int:
                require(bool(re.fullmatch(STEPS_PATTERN, key)), where, "step counts as keys, for example '4'", key)
            require(not re.search("[\ud800-\udfff]", key), where, "keys of whole characters", key)
        return {key_kind(k): item(v, _join(where, k)) for k, v in values.items()}

    return read


def _object(cls: type) -> Reader:
    readers = {name: (reader_of(hint), required) for name, (hint, required) in fields_of(cls).items()}

    def read(value: object, where: str) -> Any:
        if not isinstance(value, dict):
            raise _wrong(where or "bundle.json", "an object", value)
        given = cast(dict[str, object], value)
        _refuse_fields("missing", (n for n, (_, required) in readers.items() if required and n not in given), where)
        _refuse_fields("unknown", (name for name in given if name not in readers), where)
        return cls(**{name: readers[name][0](v, _join(where, name)) for name, v in given.items()})

    return read


def _refuse_fields(problem: str, names: Iterable[str], where: str) -> None:
    paths = [_join(where, name) for name in names]
    if paths:
        raise BundleError(f"{problem} field {clip(', '.join(paths))}")


def _check_range(value: float, note: Field, where: str) -> None:
    least, most = note.least, note.most
    fits = (least is None or value >= least) and (most is None or value <= most)
    bounds = f"{'' if least is None else f'>= {least:,}'}{' and ' if None not in (least, most) else ''}"
    require(fits, where, f"a number {bounds}{'' if most is None else f'<= {most:,}'}", value)


def _check_length(value: Any, note: Field, where: str, unit: str) -> None:
    if note.shortest == note.longest:
        expected = f"{note.shortest} {unit}"
    else:
        expected = f"{note.shortest} to {note.longest:,} {unit}"
    if not note.shortest <= len(value) <= note.longest:
        raise BundleError(f"{clip(where)}: expected {expected}, got {len(value)}")


def _join(where: str, name: str) -> str:
    shown_name = name if name.isprintable() else repr(name)
    return f"{where}.{shown_name}" if where else shown_name
