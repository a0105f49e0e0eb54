"""A case, and the hostile values and bytes that all kinds of files have in common."""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

Draw = st.DrawFn
_LARGEST = 2**20  # characters of JSON that are repeated


@dataclass(frozen=True)
class Case:
    """Damaged files, and what a worker needs to know about them."""

    files: dict[str, bytes]
    edits: tuple[str, ...]  # what was done, for people
    about: dict[str, Any] = field(default_factory=dict)  # for the target

    def __repr__(self) -> str:
        return f"Case({'; '.join(self.edits) or 'nothing was changed'}{f'; {self.about}' if self.about else ''})"


class Raw(str):
    """JSON text that no JSON writer would write."""


class Pairs(list[tuple[str, Any]]):
    """An object that may have a key twice."""


def dump(value: Any) -> str:
    """Write JSON, with Raw and Pairs in it."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def repeated(items: list[Any], times: int) -> list[Any]:
    """Repeat the items of a list, but not to more than _LARGEST characters of JSON."""
    return items * max(1, min(times, _LARGEST // max(1, len(dump(items)))))


NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        2,
        3,
        7,
        255,
        65_536,
        65_537,
        10**6,
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63) - 1,
        0.5,
        -0.0,
        1e-300,
        5e-324,
        1e30,
        1e300,
        -1e308,
    ]
)
RAW = st.sampled_from(
    [
        Raw("1e999"),
        Raw("-1e999"),
        Raw("NaN"),
        Raw("Infinity"),
        Raw("-Infinity"),
        Raw("9" * 5000),
        Raw("-" + "9" * 400),
        Raw("0." + "9" * 5000),
        Raw("1" + "0" * 400 + ".5"),
        Raw("1e-999"),
        Raw("[" * 5000 + "]" * 5000),
        Raw('{"a":' * 5000 + "1" + "}" * 5000),
        Raw("[" * 50 + "]" * 50),
        Raw('"\\ud800"'),
        Raw('"\\udc00\\ud800"'),
        Raw('{"\\udfff":1}'),
        Raw("01"),
        Raw("tru"),
        Raw('"a'),
        Raw(""),
    ]
)
TEXTS = st.sampled_from(
    [
        "",
        " ",
        "a",
        "x" * 300,
        "x" * 100_000,
        "é" * 200,
        "\0",
        "a\nb",
        "\x1b[31mred",
        "\u202eabc",
        "\ufeff",
        "😀" * 80,
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "con.onnx",
        "a/b.onnx",
        "vae_decoder.onnx",
        "bundle.json",
        "README.md",
        "nan",
        "1e5",
        "-1",
        "__class__",
        "<pad>",
        "%s%n{0}",
        "null",
    ]
)
SIMPLE = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.text(max_size=8), st.integers(), st.floats(width=32))
VALUES = st.one_of(
    SIMPLE,
    RAW,
    st.lists(SIMPLE, max_size=3),
    st.dictionaries(st.one_of(TEXTS, st.text(max_size=4)), SIMPLE, max_size=3),
    st.builds(lambda item, many: repeated([item], many), SIMPLE, st.sampled_from([1, 17, 1001, 20_000])),
)


def paths(value: Any, most: int = 12) -> list[tuple[Any, ...]]:
    """List the paths of all values in JSON; of long lists and objects only the first and last items."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return [()]
    kept = keys if len(keys) <= most else keys[: most // 2] + keys[-most // 2 :]
    return [(), *((key, *path) for key in kept for path in paths(value[key], most))]


def _parent(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = dict(value)[key] if isinstance(value, Pairs) else value[key]
    return value


def edit_json(draw: Draw, content: Any, values: st.SearchStrategy[Any] = VALUES) -> tuple[Any, str]:
    """Change one thing about JSON. Returns a new tree, and what was done."""
    content = deepcopy(content)
    path = draw(st.sampled_from(paths(content)))
    at = "/".join(map(str, path)) or "the whole"
    kind = draw(st.sampled_from(["set", "set", "near", "delete", "twice", "extra", "copy", "rename", "repeat"]))
    if not path:
        if kind == "extra" and isinstance(content, dict):
            name, value = draw(TEXTS), draw(values)
            return {**content, name: value}, f"extra {name[:30]!r}"
        if kind == "set":
            return draw(values), "replace the whole"
        return content, "nothing"
    parent, key = _parent(content, path), path[-1]
    old = parent[key]
    if kind == "set":
        parent[key] = draw(values)
    elif kind == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        change = draw(st.sampled_from(["+1", "-1", "*2", "*-1", "/2", "float", "text"]))
        parent[key] = {
            "+1": lambda: old + 1,
            "-1": lambda: old - 1,
            "*2": lambda: old * 2,
            "*-1": lambda: -old,
            "/2": lambda: old // 2 if isinstance(old, int) else old / 2,
            "float": lambda: float(old),
            "text": lambda: str(old),
        }[change]()
    elif kind == "near" and isinstance(old, str):
        parent[key] = old + draw(TEXTS) if draw(st.booleans()) else old[:-1]
    elif kind == "delete":
        del parent[key]
    elif kind == "twice" and isinstance(parent, dict):
        pairs = Pairs([*parent.items(), (key, draw(st.one_of(st.just(old), values)))])
        if len(path) == 1:
            return pairs, f"twice {at}"
        _parent(content, path[:-1])[path[-2]] = pairs
    elif kind == "extra" and isinstance(old, dict):
        old[draw(TEXTS)] = draw(values)
    elif kind == "extra" and isinstance(old, list):
        old.append(draw(st.one_of(values, st.sampled_from(old)) if old else values))
    elif kind == "copy":
        other = draw(st.sampled_from(paths(content)))
        source = content
        for step in other:
            source = source[step]
        parent[key] = deepcopy(source)
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(TEXTS)] = parent.pop(key)
    elif kind == "repeat" and isinstance(old, list):
        parent[key] = repeated(old, draw(st.sampled_from([2, 20, 2000])))
    return content, f"{kind} {at} => {repr(parent.get(key) if isinstance(parent, dict) else parent)[:60]}"


def edit_bytes(draw: Draw, data: bytes) -> tuple[bytes, str]:
    """Change bytes without regard for what they mean. Returns new bytes, and what was done."""
    kind = draw(st.sampled_from(["flip", "flip", "write", "cut", "drop", "repeat", "insert", "zero", "empty", "swap"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    said = f"{kind} at {at}"
    if kind == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :], said
    if kind == "write":
        new = draw(st.binary(min_size=1, max_size=9))
        return data[:at] + new + data[at + len(new) :], said
    if kind == "cut":
        return data[:at], said
    many = draw(st.sampled_from([1, 2, 8, 100]))
    if kind == "drop":
        return data[:at] + data[at + many :], said
    if kind == "repeat":
        return data[: at + many] + data[at:], said
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=20)) + data[at:], said
    if kind == "zero":
        return data[:at] + bytes(len(data[at : at + many])) + data[at + many :], said
    if kind == "swap":
        return data[at:] + data[:at], said
    return b"", "empty"


def encode(draw: Draw, text: str) -> tuple[bytes, str]:
    """Encode text, mostly as UTF-8."""
    how = draw(st.sampled_from(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252"]))
    return text.encode(how, "surrogatepass" if how.startswith("utf") else "replace"), how


def edited_json(draw: Draw, content: Any, values: st.SearchStrategy[Any] = VALUES) -> tuple[bytes, tuple[str, ...]]:
    """Damage JSON, mostly by its structure, sometimes by its bytes."""
    edits: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(content, dict | list) or isinstance(content, Pairs):
            break
        content, said = edit_json(draw, content, values)
        edits.append(said)
        if "twice" in said:
            break  # an object with a key twice is no tree to walk in
    data, how = encode(draw, dump(content))
    edits += [] if how == "utf-8" else [how]
    if draw(st.integers(0, 9)) == 9:
        data, said = edit_bytes(draw, data)
        edits.append(said)
    return data, tuple(edits)
