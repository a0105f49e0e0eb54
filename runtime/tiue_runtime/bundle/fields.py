"""Typed reading of JSON: a reader takes (value, where) and returns the value, or raises BundleError."""

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

from tiue_runtime.errors import BundleError

T = TypeVar("T")
Reader = Callable[[object, str], T]


def as_str(value: object, where: str) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise _wrong(where, "a string", value)
    return value


def as_int(value: object, where: str) -> int:
    """Read an integer; 4.0 and true are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(where, "an integer", value)
    return value


def as_float(value: object, where: str) -> float:
    """Read a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(where, "a number", value)
    return float(value)


def list_of(item: Reader[T]) -> Reader[tuple[T, ...]]:
    """Read a list whose items `item` reads."""

    def read(value: object, where: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        return tuple(item(v, f"{where}[{i}]") for i, v in enumerate(cast(list[object], value)))

    return read


def map_of(item: Reader[T]) -> Reader[dict[str, T]]:
    """Read an object with any keys, whose values `item` reads."""

    def read(value: object, where: str) -> dict[str, T]:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {k: item(v, _join(where, k)) for k, v in cast(dict[str, object], value).items()}

    return read


def object_of(
    make: Callable[..., T], fields: Mapping[str, Reader[object]], optional: tuple[str, ...] = ()
) -> Reader[T]:
    """Read an object with exactly these fields, `optional` ones perhaps absent, and call make(**fields)."""

    def read(value: object, where: str) -> T:
        given = map_of(lambda v, _: v)(value, where)
        missing = [name for name in fields if name not in given and name not in optional]
        unknown = [name for name in given if name not in fields]
        for problem, names in (("missing", missing), ("unknown", unknown)):
            if names:
                raise BundleError(f"{problem} field {', '.join(_join(where, n) for n in names)}")
        return make(**{name: fields[name](v, _join(where, name)) for name, v in given.items()})

    return read


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _wrong(where: str, expected: str, value: object) -> BundleError:
    kind = "null" if value is None else type(value).__name__
    return BundleError(f"{where}: expected {expected}, got {value!r} ({kind})")
